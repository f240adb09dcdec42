"""The semantic truth in plain PyTorch: forward, and a hand-written backward (docs/math.md).

`forward` is differentiable by autograd as it stands; under functorch, forward-mode AD and double
backward it runs in place of the fused operation. `backward` is the derivation that the kernels
follow. Both convert to the compute dtype themselves, so autocast stays out.
"""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterkern import _torch
from adapterkern.activations import ACTIVATIONS
from adapterkern.spec import (
    AdapterCall,
    Gradients,
    Needs,
    Outputs,
    Saved,
    added_gradients,
    tensor_values,
)

_Optional = TypeVar("_Optional", Tensor, Tensor | None)


def forward(
    call: AdapterCall,
    down: Callable[[Tensor], Tensor] | None = None,
    up: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Outputs, Saved]:
    """y [..., H] and the pre-activation z [..., R], equations (1) to (4).

    Rounds where the eager composition rounds: z, a and u are each stored in the compute dtype.

    Args:
        down, up: what projects in place of the weights of the call, [..., H] to [..., R] and back,
            such as a module that has to be called to be itself; give both or none. They see the
            autocast of the caller.
    """
    if down is None and _torch.may_autocast():
        with _without_autocast(call.x):
            return _forward(call, down, up)
    return _forward(call, down, up)


def _forward(
    call: AdapterCall,
    down: Callable[[Tensor], Tensor] | None,
    up: Callable[[Tensor], Tensor] | None,
) -> tuple[Outputs, Saved]:
    dtype = call.compute_dtype
    if down is None:
        x = _without_gaps(_to(call.x, dtype))
        z = F.linear(x, _to(call.down_weight, dtype), _to(call.down_bias, dtype))
    else:
        z = _to(down(call.x), dtype)
    a = ACTIVATIONS[call.activation].value(z)
    if up is None:
        y = F.linear(a, _to(call.up_weight, dtype), _to(call.up_bias, dtype))
    else:
        y = _to(up(a), dtype)
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
    return Outputs(y), Saved(z)


def backward(call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs) -> Gradients:
    """The gradients in `needs`, equations (5) to (12).

    Args:
        saved: z [T, R], the pre-activation that forward computed.
        upstream: the gradient of y [..., H], any strides, in the dtype of y.

    The gradients of residual and skip are that of y itself.
    """
    assert saved.z is not None
    with _without_autocast(call.x):
        gradients = _backward(call, saved.z, upstream.y.reshape(-1, call.hidden_size), needs)
    shaped = [
        None
        if gradient is None or tensor is None
        else gradient.to(tensor.dtype).reshape(tensor.shape)
        for gradient, tensor in zip(gradients, tensor_values(call), strict=True)
    ]
    return Gradients(*shaped)._replace(**added_gradients(upstream, needs))


def _backward(call: AdapterCall, z: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    dtype, activation = call.compute_dtype, ACTIVATIONS[call.activation]
    # For elementwise products and long sums, which half precision would lose and kernels do not.
    wide = torch.promote_types(dtype, torch.float32)
    x = call.x.reshape(-1, call.hidden_size)  # [T, H]
    dx = d_down = d_up = d_down_bias = d_up_bias = d_scaling = None

    du = (dy * (call.scale if call.scaling is None else call.scaling)).to(dtype)  # [T, H]  (5)
    if needs.up_weight or needs.scaling:
        a = activation.value(z)  # [T, R], recomputed rather than saved
    if needs.up_weight:
        d_up = du.T @ a  # [H, R]                                                           (6)
    if needs.up_bias:
        d_up_bias = du.sum(0)  # [H]                                                        (7)
    if needs.scaling:
        u = F.linear(a, call.up_weight.to(dtype), _to(call.up_bias, dtype))
        d_scaling = (dy.to(wide) * u.to(wide)).sum(0)  # [H]                                (8)
        if call.scaling is not None and call.scaling.numel() == 1:
            d_scaling = d_scaling.sum(0, keepdim=True)
    if needs.dz:
        da = du @ call.up_weight.to(dtype)
        dz = (da.to(wide) * activation.derivative(z.to(wide))).to(dtype)  # [T, R]          (9)
    if needs.down_weight:
        d_down = dz.T @ x.to(dtype)  # [R, H]                                               (10)
    if needs.down_bias:
        d_down_bias = dz.sum(0)  # [R]                                                      (11)
    if needs.x:
        dx = dz @ call.down_weight.to(dtype)  # [T, H]                                      (12)
        dx = dx + dy if call.add_input else dx
    return Gradients(dx, d_down, d_up, d_down_bias, d_up_bias, scaling=d_scaling)


def _to(tensor: _Optional, dtype: torch.dtype) -> _Optional:
    # Tensor.to takes as long as a small addition even where there is nothing to convert.
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _without_gaps(x: Tensor) -> Tensor:
    """x in one piece where oneDNN's half-precision products would read between its rows.

    On CPUs with AMX they load past the end of a row whose width is no multiple of 32, and multiply
    what is there by zero: NaN or Inf in a gap makes the row NaN, in plain torch too
    (https://github.com/uxlfoundation/oneDNN/issues/5717).
    """
    return x.contiguous() if x.dtype.itemsize == 2 and x.is_cpu else x


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
