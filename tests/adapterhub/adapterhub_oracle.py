"""The differential oracle: every BottleneckLayer call of a model's run, replayed stock and patched.

A replay hands the layer detached inputs that need a gradient, in the context that the call was
made in, and a random upstream gradient. Outputs, dtypes, shapes and all gradients must agree.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from torch import Tensor, nn

from adapterkern import _env, dispatch
from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import fast_path

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class Call(NamedTuple):
    layer: Any
    hidden_states: Tensor
    residual_input: Tensor | None
    layer_norm: Any
    context: Any  # as it was before the call
    autocast: bool


class Replay(NamedTuple):
    output: Tensor
    gradients: dict[str, Tensor | None]

    def named(self) -> dict[str, Tensor | None]:
        return {"output": self.output, **self.gradients}


class OracleError(AssertionError):
    """Stock and patched disagree."""


def record(run: Callable[[], Any]) -> list[Call]:
    """Record the calls of `run`, which must be of an unpatched model with an active adapter."""
    calls: list[Call] = []
    stock = BottleneckLayer.bottleneck_layer_forward

    def recording(self, hidden_states, residual_input, layer_norm):
        if self.get_active_setup() is not None:
            context = copy.copy(ForwardContext.get_context())
            autocast = torch.is_autocast_enabled(hidden_states.device.type)
            calls.append(Call(self, hidden_states, residual_input, layer_norm, context, autocast))
        return stock(self, hidden_states, residual_input, layer_norm)

    BottleneckLayer.bottleneck_layer_forward = recording
    try:
        run()
    finally:
        BottleneckLayer.bottleneck_layer_forward = stock
    return calls


@contextlib.contextmanager
def _context(call: Call) -> Iterator[None]:
    context = copy.copy(call.context)
    ForwardContext.get_contexts().append(context)
    try:
        device = call.hidden_states.device.type
        with torch.autocast(device, torch.bfloat16, enabled=call.autocast):
            yield
    finally:
        ForwardContext.get_contexts().pop()


def replay(call: Call) -> Replay:
    """Return output and gradients of one call, in whatever form the layer has now."""
    inputs = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in (("h", call.hidden_states), ("inp", call.residual_input))
        if tensor is not None
    }
    wanted = dict(inputs)
    wanted.update((n, p) for n, p in call.layer.named_parameters() if p.requires_grad)
    if isinstance(call.layer_norm, nn.Module):
        norm = call.layer_norm.named_parameters()
        wanted.update((f"norm.{n}", p) for n, p in norm if p.requires_grad)
    with _context(call):
        output = call.layer.bottleneck_layer_forward(
            inputs["h"], inputs.get("inp"), call.layer_norm
        )
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(output.shape, generator=generator).to(output)
    grads = torch.autograd.grad(output, list(wanted.values()), upstream, allow_unused=True)
    return Replay(output.detach(), dict(zip(wanted, grads, strict=True)))


def infer(call: Call) -> Replay:
    """Return the output of one call that records no gradient, which may take its own path."""
    with torch.no_grad(), _context(call):
        inputs = call.hidden_states.detach(), call.residual_input
        output = call.layer.bottleneck_layer_forward(
            inputs[0], None if inputs[1] is None else inputs[1].detach(), call.layer_norm
        )
    return Replay(output, {})


@contextlib.contextmanager
def backends_chosen() -> Iterator[set[str]]:
    """Collect the backends that adapter calls within the block were given to."""
    chosen: set[str] = set()
    select = dispatch.select

    def recording(*args):
        decision = select(*args)
        chosen.add(decision.backend)
        return decision

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(dispatch, "select", recording)
        yield chosen


def change_calls(patcher: pytest.MonkeyPatch, change: Callable) -> None:
    """Let `change(call)` run in the place of every fused call."""
    run = fast_path.run_call
    patcher.setattr(fast_path, "run_call", lambda call: run(change(call)))


def compare(model: nn.Module, calls: list[Call], **options: Any) -> set[str]:
    """Replay `calls` stock and patched; `options` are those of `patched`.

    Returns:
        The backends that ran the patched model's fused calls: on a GPU kernels alone.

    Raises:
        OracleError: some error exceeds its tolerance, dtypes or shapes differ, or a fused call that
            a kernel should run ran on the reference, which would say nothing.
    """
    assert calls, "no adapter was active"
    backends: set[str] = set()
    for number, call in enumerate(calls):
        for form in (replay, infer):
            stock = form(call)
            with adapterhub.patched(model, **options), backends_chosen() as chosen:
                patched = form(call)
            backends |= chosen
            _check(call, form, stock, patched, f"call {number} ({call.layer.location_key})")
    refuse_the_reference(calls[0].hidden_states.device.type, backends)
    return backends


def runs_kernels(device: str) -> bool:
    """Return whether calls there run on kernels: on a GPU, and in Triton's CPU interpreter."""
    return device != "cpu" or _env.TRITON_INTERPRET


def refuse_the_reference(device: str, backends: set[str]) -> None:
    """Raise if kernels should have run and did not: the comparison would say nothing."""
    if runs_kernels(device) and "reference" in backends:
        raise OracleError(f"on {device} fused calls ran on the reference")


def _check(call: Call, form: Callable, stock: Replay, patched: Replay, where: str) -> None:
    where = f"{where}, {form.__name__}"
    half = call.autocast or stock.output.dtype != torch.float32
    tolerance = TOLERANCE[torch.bfloat16 if half else torch.float32]
    expected = stock.named()
    for name, found in patched.named().items():
        # A softmax does not see a bias of its keys: that gradient is 0, and all of it rounding.
        scale = expected[name.replace(".key.bias", ".key.weight")]
        error = _error(found, expected[name], f"{where}: {name}", scale) / tolerance
        if half and error > 1:
            # Half of such a difference is stock's own rounding: float32 knows what is right.
            truth = in_float32(call, form).named()[name]
            if name.endswith(".scaling"):
                # A sum over all tokens and features cancels, so the sums by feature give the scale.
                error = _error(found, expected[name], where, truth.abs().sum()) / tolerance
            else:
                error = _error(found.float(), truth, where) / tolerance
        if not error <= 1:
            raise OracleError(f"{where}: {name} is off by {error:.3g} tolerances")


def in_float32(call: Call, form: Callable[[Call], Replay]) -> Replay:
    """Run the stock call again, all of it in float32, with a scaling for each feature."""
    layer, norm = copy.deepcopy((call.layer, call.layer_norm))
    for adapter in layer.adapters.values():
        if isinstance(adapter.scaling, nn.Parameter):
            shape = adapter.adapter_up.bias.shape
            adapter.scaling = nn.Parameter(adapter.scaling.detach().expand(shape).clone())
    inputs = (call.hidden_states, call.residual_input)
    h, inp = (None if t is None else t.detach().float() for t in inputs)
    norm = norm.float() if isinstance(norm, nn.Module) else norm
    return form(Call(layer.float(), h, inp, norm, call.context, False))


def _error(
    found: Tensor | None, expected: Tensor | None, where: str, beside: Tensor | None = None
) -> float:
    """Return the largest difference over the largest expected value, or that of `beside`."""
    if expected is None or found is None:
        # A gradient that does not exist and one of zeros mean the same.
        other = found if expected is None else expected
        if other is not None and other.abs().max() > 0:
            raise OracleError(f"{where}: only one of stock and patched has a gradient")
        return 0.0
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        raise OracleError(
            f"{where}: {found.dtype} {list(found.shape)}, "
            f"expected {expected.dtype} {list(expected.shape)}"
        )
    if expected.numel() == 0:
        return 0.0
    scale = (expected if beside is None else beside).abs().max().item() or 1.0
    return (found.double() - expected.double()).abs().max().item() / scale
