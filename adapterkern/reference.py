"""The semantic truth in plain PyTorch: forward, and a hand-written backward (docs/math.md).

`forward` is differentiable by autograd as it stands; under functorch, forward-mode AD and double
backward it runs in place of the fused operation. `backward` is the derivation that the kernels
follow. Both convert to the compute dtype themselves, so autocast stays out.
"""

import contextlib
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterkern.activations import ACTIVATIONS
from adapterkern.spec import AdapterCall

_Optional = TypeVar("_Optional", Tensor, Tensor | None)


def forward(call: AdapterCall) -> tuple[Tensor, Tensor]:
    """y [..., H] and the pre-activation z [..., R], equations (1) to (4).

    Rounds where the eager composition rounds: z, a and u are each stored in the compute dtype.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        with _without_autocast(call.x):
            return _forward(call)
    return _forward(call)


def _forward(call: AdapterCall) -> tuple[Tensor, Tensor]:
    dtype = call.compute_dtype
    x = _without_gaps(_to(call.x, dtype))
    z = F.linear(x, _to(call.down_weight, dtype), _to(call.down_bias, dtype))
    a = ACTIVATIONS[call.activation].value(z)
    y = F.linear(a, _to(call.up_weight, dtype), _to(call.up_bias, dtype))
    if call.scaling is not None:
        y = y * call.scaling
    elif call.scale != 1.0:
        y = y * call.scale
    if call.dropout > 0:
        y = F.dropout(y, call.dropout, training=True)
    residual = call.x if call.add_input else call.residual
    if residual is not None:
        y = y + residual
    if call.skip is not None:
        y = y + call.skip
    return y, z


def backward(
    call: AdapterCall, z: Tensor, grad_output: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, down_weight, up_weight, down_bias, up_bias, scaling), equations (5) to (12).

    Args:
        z: [T, R], the pre-activation that forward computed.
        grad_output: [..., H], any strides, the dtype of y.
        needs: which of the six gradients to compute; the others are None.

    The gradients of residual and skip are grad_output itself and are left to the caller.
    """
    with _without_autocast(call.x):
        gradients = _backward(call, z, grad_output.reshape(-1, call.hidden_size), needs)
    inputs = (*call[:5], call.scaling)
    return tuple(
        None
        if gradient is None or tensor is None
        else gradient.to(tensor.dtype).reshape(tensor.shape)
        for gradient, tensor in zip(gradients, inputs, strict=True)
    )


def _backward(
    call: AdapterCall, z: Tensor, dy: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    need_x, need_down, need_up, need_down_bias, need_up_bias, need_scaling = needs
    dtype, activation = call.compute_dtype, ACTIVATIONS[call.activation]
    # For elementwise products and long sums, which half precision would lose and kernels do not.
    wide = torch.promote_types(dtype, torch.float32)
    x = call.x.reshape(-1, call.hidden_size)  # [T, H]
    dx = d_down = d_up = d_down_bias = d_up_bias = d_scaling = None

    du = (dy * (call.scale if call.scaling is None else call.scaling)).to(dtype)  # [T, H]  (5)
    if need_up or need_scaling:
        a = activation.value(z)  # [T, R], recomputed rather than saved
    if need_up:
        d_up = du.T @ a  # [H, R]                                                           (6)
    if need_up_bias:
        d_up_bias = du.sum(0)  # [H]                                                        (7)
    if need_scaling:
        u = F.linear(a, call.up_weight.to(dtype), _to(call.up_bias, dtype))
        d_scaling = (dy.to(wide) * u.to(wide)).sum(0)  # [H]                                (8)
        if call.scaling is not None and call.scaling.numel() == 1:
            d_scaling = d_scaling.sum(0, keepdim=True)
    if need_x or need_down or need_down_bias:
        da = du @ call.up_weight.to(dtype)
        dz = (da.to(wide) * activation.derivative(z.to(wide))).to(dtype)  # [T, R]          (9)
    if need_down:
        d_down = dz.T @ x.to(dtype)  # [R, H]                                               (10)
    if need_down_bias:
        d_down_bias = dz.sum(0)  # [R]                                                      (11)
    if need_x:
        dx = dz @ call.down_weight.to(dtype)  # [T, H]                                      (12)
        dx = dx + dy if call.add_input else dx
    return dx, d_down, d_up, d_down_bias, d_up_bias, d_scaling


def _to(tensor: _Optional, dtype: torch.dtype) -> _Optional:
    # Tensor.to takes as long as a small addition even where there is nothing to convert.
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _without_gaps(x: Tensor) -> Tensor:
    """x in one piece where oneDNN's half-precision products would read between its rows.

    On CPUs with AMX they load past the end of a row whose width is no multiple of 32, and multiply
    what is there by zero: NaN or Inf in a gap makes the row NaN, in plain torch too
    (https://github.com/uxlfoundation/oneDNN/issues/5717).
    """
    return x.contiguous() if x.device.type == "cpu" and x.dtype.itemsize == 2 else x


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
