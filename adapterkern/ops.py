"""The operation as torch sees it: two registered ops and one autograd.Function around them.

The ops are defined with `Library.define` + `impl` + `register_fake`, and autograd stands outside in a ctx-style
`autograd.Function`: `custom_op` + `register_autograd` and `setup_context` each cost more host time than the eager
adapter's four ops, and the former drops forward-mode tangents silently (pytorch#176592, #139500, #192985).
The ops themselves carry no autograd; they are not public.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkern import reference
from adapterkern.backends import get
from adapterkern.backends.base import Gradients, Needs
from adapterkern.spec import AdapterCall

_CALL = (
    "Tensor x, Tensor down_weight, Tensor up_weight, Tensor? down_bias, Tensor? up_bias, Tensor? residual, "
    "Tensor? skip, Tensor? scaling, float scale, bool add_input, str activation, ScalarType compute_dtype"
)
_library = torch.library.Library("adapterkern", "DEF")
_library.define(f"forward({_CALL}, str backend, bool save_z) -> (Tensor y, Tensor z)")
_library.define(f"backward({_CALL}, str backend, Tensor z, Tensor grad_output, bool[] needs) -> Tensor[]")


def _forward(*args) -> tuple[Tensor, Tensor]:
    *call, backend, save_z = args
    call = AdapterCall(*call)
    with torch.autocast(call.x.device.type, enabled=False) if _autocast_is_on(call.x) else _NOTHING:
        return get(backend).forward(call, save_z)


def _backward(*args) -> list[Tensor]:
    *call, backend, z, grad_output, needs = args
    call = AdapterCall(*call)
    with torch.autocast(call.x.device.type, enabled=False) if _autocast_is_on(call.x) else _NOTHING:
        gradients = get(backend).backward(call, z, grad_output, Needs(*needs))
    return [g for g in gradients if g is not None]


def _forward_fake(*args) -> tuple[Tensor, Tensor]:
    *call, _backend, save_z = args
    call = AdapterCall(*call)
    # Fresh and contiguous, exactly as every backend allocates them; copying x's strides would be a lie.
    y = call.x.new_empty(call.x.shape, dtype=call.output_dtype)
    z_shape = (call.x.numel() // call.hidden_size, call.bottleneck_size) if save_z else (0,)
    return y, call.x.new_empty(z_shape, dtype=call.compute_dtype)


def _backward_fake(*args) -> list[Tensor]:
    *call, _backend, _z, _grad_output, needs = args
    call = AdapterCall(*call)
    return [t.new_empty(t.shape) for t, need in zip(_differentiable(call), needs, strict=True) if need]


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_exc) -> None: ...


_NOTHING = _Nothing()  # contextlib.nullcontext costs three times as much to enter


def _autocast_is_on(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


for _name, _impl, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake)):
    _library.impl(_name, _impl, "CPU")
    _library.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"adapterkern::{_name}", _fake, lib=_library)

_forward_op = torch.ops.adapterkern.forward.default
_backward_op = torch.ops.adapterkern.backward.default


def _differentiable(call: AdapterCall) -> tuple:
    """The tensors of a call in the order of `Gradients`."""
    return call.x, call.down_weight, call.up_weight, call.down_bias, call.up_bias, call.scaling


class _BottleneckAdapter(torch.autograd.Function):
    """Autograd of one call; the forward's backend runs the backward. Saves x, z and the parameters."""

    @staticmethod
    def forward(ctx, backend: str, *call) -> Tensor:  # ctx style on purpose, see the module's docstring
        call = AdapterCall(*call)
        y, z = _forward_op(*call[:12], backend, True)
        ctx.save_for_backward(*_differentiable(call), z)
        ctx.options = call[8:12]
        ctx.backend = backend
        ctx.residual_dtype = None if call.residual is None else call.residual.dtype
        ctx.skip_dtype = None if call.skip is None else call.skip.dtype
        return y

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, down_weight, up_weight, down_bias, up_bias, scaling, z = ctx.saved_tensors
        call = AdapterCall(x, down_weight, up_weight, down_bias, up_bias, None, None, scaling, *ctx.options)
        asked = ctx.needs_input_grad[1:9]  # after `backend`, the eight tensors of AdapterCall
        needs = Needs(*asked[:5], asked[7])
        gradients = (
            _differentiable_backward(call, grad_output, needs)
            if torch.is_grad_enabled()  # create_graph=True: this backward will itself be differentiated
            else _fused_backward(call, ctx.backend, z, grad_output, needs)
        )
        d_residual = grad_output.to(ctx.residual_dtype) if asked[5] else None
        d_skip = grad_output.to(ctx.skip_dtype) if asked[6] else None
        return None, *gradients[:5], d_residual, d_skip, gradients.scaling, None, None, None, None, None


def _fused_backward(call: AdapterCall, backend: str, z: Tensor, grad_output: Tensor, needs: Needs) -> Gradients:
    if not any(needs):
        return Gradients()
    computed = iter(_backward_op(*call[:12], backend, z, grad_output, list(needs)))
    return Gradients(*(next(computed) if need else None for need in needs))


def _differentiable_backward(call: AdapterCall, grad_output: Tensor, needs: Needs) -> Gradients:
    """The same gradients as a graph of plain PyTorch operations, for a derivative of the derivative."""
    y, _ = reference.forward(call)
    wanted = [t for t, need in zip(_differentiable(call), needs, strict=True) if need]
    computed = iter(torch.autograd.grad(y, wanted, grad_output, create_graph=True) if wanted else ())
    return Gradients(*(next(computed) if need else None for need in needs))


def run(call: AdapterCall, backend: str) -> Tensor:
    """y of a validated call on the backend called `backend`, recorded by autograd where a gradient is needed."""
    if torch.is_grad_enabled():
        return _BottleneckAdapter.apply(backend, *call)
    return _forward_op(*call[:12], backend, False)[0]


def _flops(products: int, x_shape: Sequence[int], down_weight_shape: Sequence[int]) -> int:
    tokens = 1
    for size in x_shape[:-1]:
        tokens *= size
    return products * 2 * tokens * down_weight_shape[0] * down_weight_shape[1]


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.adapterkern.forward)(
        lambda x_shape, down_shape, *_args, out_shape=None, **_options: _flops(2, x_shape, down_shape)
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
