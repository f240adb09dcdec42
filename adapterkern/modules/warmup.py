"""Compiles and loads the kernels that the first calls of a module need."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def warmup(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Compile and load every kernel that the first calls of `module` on such inputs need.

    It runs the module on copies of its inputs with gradients recorded, then the backward of all
    that requires a gradient, then the module once more without recording. A first call inside the
    capture of a CUDA graph fails, because a capture allows no kernel to be loaded; after a warmup
    it is not the first one. Nor is the first batch of a service:

        ak.warmup(adapter, x)  # x: a buffer that every replay reads
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = adapter(x)
        x.copy_(batch)
        graph.replay()  # y holds the adapter's result for batch

    Kernels depend on dtypes, on whether sizes and strides are multiples of 16, on the number of
    tokens, and on which tensors require gradients: give inputs like those to come. No `.grad`, no
    buffer, no input, no state of torch's random generators and no train/eval mode changes. An
    argument that is neither a tensor nor a list, tuple or dict of them is passed unchanged; if the
    model writes into a key-value cache, pass one that may be overwritten.

    Args:
        module: a `BottleneckAdapter`, or any model that contains some. Under
            DistributedDataParallel warm up `model.module`: the wrapper expects a backward after
            every recorded forward.
        args, kwargs: the arguments of `module`, as in `ak.warmup(adapter, x, skip=block_in)`.

    Raises:
        TypeError: `module` is no nn.Module.
        RuntimeError: a CUDA graph is being captured.
        ValueError, BackendUnsupportedError: as the call itself.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module must be a torch.nn.Module, got {type(module).__name__}.\n"
            "  hint: ak.warmup(adapter, x), with the adapter or model first"
        )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "ak.warmup was called while a CUDA graph is being captured, which allows no kernel to "
            "be loaded.\n  hint: call it before `with torch.cuda.graph(...)`"
        )
    with undisturbed(module, args, kwargs):
        _run(module, *_copied((args, kwargs), {}))


@contextmanager
def undisturbed(module: nn.Module, args: Any, kwargs: Any) -> Iterator[None]:
    """Give the buffers of `module`, and torch's random generators, back as they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    tensors = [*module.parameters(), *_tensors((args, kwargs))]
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.inference_mode(False):
        yield
    with torch.no_grad():
        for buffer, value in buffers:
            if not torch.equal(buffer, value):  # by value: batch_norm writes without a new version
                buffer.copy_(value)


def _run(module: nn.Module, args: Any, kwargs: Any) -> None:
    with torch.enable_grad():
        outputs = [t for t in _tensors(module(*args, **kwargs)) if t.requires_grad]
        leaves = [*module.parameters(), *_tensors((args, kwargs))]
        wanted = list(dict.fromkeys(leaf for leaf in leaves if leaf.requires_grad))
        if outputs:  # autograd.grad sets no .grad and calls no hook of a parameter
            gradients = [torch.ones_like(t, memory_format=torch.contiguous_format) for t in outputs]
            torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    with torch.no_grad():
        module(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """Copy `value` with leaves in place of its tensors; a tensor in two places is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = _copy(value)
        return copies[id(value)]
    if type(value) is dict:
        return {name: _copied(part, copies) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(part, copies) for part in value)
    return value


@torch.no_grad()
def _copy(tensor: Tensor) -> Tensor:
    """A leaf of the same values, strides and alignment, on which kernels are specialised."""
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    shift = tensor.data_ptr() % 16 // tensor.element_size()
    room = torch.empty(shift + extent, dtype=tensor.dtype, device=tensor.device)
    flat = tensor.detach().as_strided((extent,), (1,))
    room[shift:].copy_(flat)
    copy = room.as_strided(tensor.shape, tensor.stride(), shift)
    return copy.requires_grad_(tensor.requires_grad)
