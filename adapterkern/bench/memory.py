"""Counts a call's peak and transient memory, its bytes saved for the backward, and its kernels."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkern.bench import driver
from adapterkern.bench.timing import CudaTimer, Subject


@dataclass(frozen=True)
class Memory:
    """Bytes beyond what was allocated before a call, and beyond what is still alive after it."""

    peak: int
    transient: int


def allocated(call: Callable[[], Any], device: torch.device) -> Memory | None:
    """Measure what torch's allocator hands out in one call; None on a CPU, which counts nothing."""
    if device.type != "cuda":
        return None
    call()  # one-time buffers, such as a matrix library's workspace
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_allocated(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return Memory(peak - before, peak - after)


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Count the bytes that autograd keeps for `forward`'s backward, beside those of `known`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # alive until counted, so that no address is handed out twice
    total = sum(kept.values())
    del result
    return total


def kernels_launched(call: Callable[[], Any], timer: CudaTimer) -> int:
    """Count the kernels, copies and fills that one call runs: the nodes of its CUDA graph.

    A profiler would stay attached and slow every launch after it (pytorch#144455).

    Raises:
        TypeError: this version of torch keeps no graph that could be counted.
        Exception: whatever stops the capture, or the driver's answer.
    """
    graph, _ = timer.capture(Subject([call], least_calls=1), keep_graph=True)
    return driver.graph_nodes(graph.raw_cuda_graph())
