"""The operation as torch sees it: two registered ops and one autograd.Function around them.

The ops are defined with `Library.define` + `impl` + `register_fake`, and their autograd is a
ctx-style `autograd.Function`: `custom_op` + `register_autograd` and `setup_context` each cost more
host time than the eager adapter's four ops, and the former drops forward-mode tangents silently
(pytorch#176592, #139500, #192985). Eager calls enter that Function directly; graphs that
torch.compile or torch.export made hold the op, whose autograd kernel enters it. Below autograd,
where nobody watches operations, an eager call goes straight to its backend: the op's way through
torch's dispatcher costs 4 us, as much as all else here. Not public.
"""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adapterkern import reference
from adapterkern.backends import get
from adapterkern.backends.base import Gradients, Needs
from adapterkern.spec import ORDINARY, AdapterCall

logger = logging.getLogger("adapterkern")

_CALL = (
    "Tensor x, Tensor down_weight, Tensor up_weight, Tensor? down_bias, Tensor? up_bias, "
    "Tensor? residual, Tensor? skip, Tensor? scaling, float scale, bool add_input, "
    "str activation, ScalarType compute_dtype"
)
_library = torch.library.Library("adapterkern", "DEF")
_library.define(f"forward({_CALL}, str backend, bool save_z) -> (Tensor y, Tensor z)")
_library.define(
    f"backward({_CALL}, str backend, Tensor z, Tensor grad_output, bool[] needs) -> Tensor[]"
)

_CALL_SIZE = _CALL.count(",") + 1  # these are the first fields of `AdapterCall`


def _forward(*args) -> tuple[Tensor, Tensor]:
    backend, save_z = args[_CALL_SIZE:]
    return get(backend).forward(AdapterCall(*args[:_CALL_SIZE]), save_z)


def _backward(*args) -> list[Tensor]:
    backend, z, grad_output, needs = args[_CALL_SIZE:]
    call = AdapterCall(*args[:_CALL_SIZE])
    gradients = get(backend).backward(call, z, grad_output, Needs(*needs))
    return [g for g in gradients if g is not None]


def _forward_fake(*args) -> tuple[Tensor, Tensor]:
    call, save_z = AdapterCall(*args[:_CALL_SIZE]), args[-1]
    # Fresh and contiguous, as every backend allocates them; copying x's strides would be a lie.
    y = call.x.new_empty(call.x.shape, dtype=call.output_dtype)
    z_shape = (call.x.numel() // call.hidden_size, call.bottleneck_size) if save_z else (0,)
    return y, call.x.new_empty(z_shape, dtype=call.compute_dtype)


def _backward_fake(*args) -> list[Tensor]:
    call, needs = AdapterCall(*args[:_CALL_SIZE]), args[-1]
    wanted = zip(_differentiable(call), needs, strict=True)
    return [t.new_empty(t.shape) for t, need in wanted if need and t is not None]


for _name, _impl, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
):
    # For every device: the reference runs wherever PyTorch does, and dispatch keeps others off.
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adapterkern::{_name}", _fake, lib=_library)

_forward_op = torch.ops.adapterkern.forward.default
_backward_op = torch.ops.adapterkern.backward.default


def _is_watched(x: Tensor) -> bool:
    """Whether operations are traced, counted, faked or profiled, so that the op must be seen."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in ORDINARY
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _forward_below_autograd(call: AdapterCall, backend: str, save_z: bool) -> tuple[Tensor, Tensor]:
    if _is_watched(call.x):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(*call[:_CALL_SIZE], backend, save_z)
    return get(backend).forward(call, save_z)


def _differentiable(call: AdapterCall) -> tuple[Tensor | None, ...]:
    """The tensors of a call in the order of `Gradients`."""
    return (*call[:5], call.scaling)


class _BottleneckAdapter(torch.autograd.Function):
    """Autograd of one call; the forward's backend runs the backward. Saves x, z and parameters."""

    # ctx style: see the top. `tensors` are those of `call`, which autograd does not look into.
    @staticmethod
    def forward(
        ctx, backend: str, call: AdapterCall, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, z = _forward_below_autograd(call, backend, True)
        x, down_weight, up_weight, down_bias, up_bias, residual, skip, scaling = tensors
        ctx.save_for_backward(x, down_weight, up_weight, down_bias, up_bias, scaling, z)
        ctx.options = call[8:_CALL_SIZE]
        ctx.backend = backend
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.skip_dtype = None if skip is None else skip.dtype
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)  # or every backward would fill zeros for z
        return y, z

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, _grad_z: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        x, down_weight, up_weight, down_bias, up_bias, scaling, z = ctx.saved_tensors
        call = AdapterCall(
            x, down_weight, up_weight, down_bias, up_bias, None, None, scaling, *ctx.options
        )
        asked = ctx.needs_input_grad[2:]  # of the eight tensors
        needs = Needs._make((*asked[:5], asked[7]))
        if not any(needs):
            gradients = Gradients()
        elif torch.is_grad_enabled():  # create_graph=True: to be differentiated itself
            if ctx.backend != "reference":
                _log_plain_backward(ctx.backend)
            gradients = _differentiable_backward(call, grad_output, needs)
        elif _is_batched(grad_output):
            gradients = Gradients(*reference.backward(call, z, grad_output, needs))
        else:
            computed = iter(_backward_op(*call[:_CALL_SIZE], ctx.backend, z, grad_output, needs))
            gradients = Gradients(*(next(computed) if need else None for need in needs))
        d_residual = grad_output.to(ctx.residual_dtype) if asked[5] else None
        d_skip = grad_output.to(ctx.skip_dtype) if asked[6] else None
        return None, None, *gradients[:5], d_residual, d_skip, gradients.scaling


# Less what `Function.apply` does before, for setup_context and functorch: neither is in `run`.
_apply = super(torch.autograd.Function, _BottleneckAdapter).apply


def _forward_autograd(*args) -> tuple[Tensor, Tensor]:
    """The autograd kernel of the forward op, for calls from a graph."""
    backend, save_z = args[_CALL_SIZE:]
    call = AdapterCall(*args[:_CALL_SIZE])
    if forward_ad._current_level >= 0:  # known to no graph, which was traced without tangents
        return reference.forward(call)
    if not _needs_gradient(call):
        return _forward_below_autograd(call, backend, save_z)
    y, z = _BottleneckAdapter.apply(backend, call, *call[:8])
    return y, z if save_z else z.new_empty(0)


_library.impl("forward", _forward_autograd, "Autograd")


def _needs_gradient(call: AdapterCall) -> bool:
    if torch.is_grad_enabled():
        for tensor in call[:8]:  # a third of the time of any() over a generator
            if tensor is not None and tensor.requires_grad:
                return True
    return False


@functools.cache
def _log_plain_backward(backend: str) -> None:
    logger.warning(
        "the PyTorch reference runs the backward (%s: create_graph=True asks for a differentiable "
        "gradient, and the kernels have no second derivative)",
        backend,
    )


def _is_batched(grad_output: Tensor) -> bool:
    """Whether many gradients are asked for at once: vmap around autograd, is_grads_batched=True."""
    functorch = torch._C._functorch
    return torch._C._are_functorch_transforms_active() or functorch.is_legacy_batchedtensor(
        grad_output
    )


def _differentiable_backward(call: AdapterCall, grad_output: Tensor, needs: Needs) -> Gradients:
    """The same gradients as a graph of plain PyTorch operations, for a second derivative."""
    # Of aliases: an input computed from another one must not count towards that one's gradient.
    inputs = [None if t is None else t.view_as(t) for t in _differentiable(call)]
    parameters: dict[str, Any] = dict(zip(Gradients._fields, inputs, strict=True))
    y, _ = reference.forward(call._replace(**parameters))
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    computed = iter(torch.autograd.grad(y, wanted, grad_output.to(y.dtype), create_graph=True))
    return Gradients(*(next(computed) if need else None for need in needs))


def run(call: AdapterCall, backend: str) -> Tensor:
    """y of a validated call on the backend of that name, recorded where a gradient is needed."""
    needs_gradient = _needs_gradient(call)
    if torch.compiler.is_compiling():
        return _forward_op(*call[:_CALL_SIZE], backend, needs_gradient)[0]
    if needs_gradient:
        return _apply(backend, call, *call[:8])[0]
    return _forward_below_autograd(call, backend, False)[0]


def _flops(products: int, x_shape: Sequence[int], down_weight_shape: Sequence[int]) -> int:
    return products * 2 * math.prod(x_shape[:-1]) * math.prod(down_weight_shape)


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.adapterkern.forward)(
        lambda x_shape, down_shape, *_args, out_shape=None, **_options: _flops(
            2, x_shape, down_shape
        )
    )
    # Of the backward's four products only those count whose gradients are asked for.
    register_flop_formula(torch.ops.adapterkern.backward)(
        lambda x_shape, down_shape, *args, out_shape=None, **_options: _flops(
            _backward_products(args[-1]), x_shape, down_shape
        )
    )


def _backward_products(needs: Sequence[bool]) -> int:
    asked = Needs(*needs)
    dz = asked.x or asked.down_weight or asked.down_bias
    return dz + asked.x + asked.down_weight + (asked.up_weight or asked.scaling)


_register_flop_formulas()
