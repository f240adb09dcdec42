"""The semantic truth in plain PyTorch: forward, and the hand-written backward. Equations: docs/math.md.

`forward` is differentiable by autograd as it stands; under functorch, forward-mode AD and double backward it runs
in place of the fused operation. `backward` is the derivation that the kernels follow.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterkern.activations import ACTIVATIONS
from adapterkern.spec import AdapterCall


def forward(call: AdapterCall) -> tuple[Tensor, Tensor]:
    """y [..., H] and the pre-activation z [..., R], equations (1) to (4).

    Rounds where the eager composition rounds: z, a and u are each stored in the compute dtype.
    """
    dtype = call.compute_dtype
    z = F.linear(call.x.to(dtype), call.down_weight.to(dtype), _to(call.down_bias, dtype))
    a = ACTIVATIONS[call.activation].value(z)
    y = F.linear(a, call.up_weight.to(dtype), _to(call.up_bias, dtype))
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
    need_x, need_down, need_up, need_down_bias, need_up_bias, need_scaling = needs
    dtype, activation = call.compute_dtype, ACTIVATIONS[call.activation]
    dy = grad_output.reshape(-1, call.hidden_size)  # [T, H]
    x = call.x.reshape(-1, call.hidden_size)  # [T, H]
    dx = d_down = d_up = d_down_bias = d_up_bias = d_scaling = None

    scale = call.scale if call.scaling is None else call.scaling
    du = (dy * scale).to(dtype)  # [T, H]                                            (5)
    if need_up or need_scaling:
        a = activation.value(z)  # [T, R], recomputed rather than saved
    if need_up:
        d_up = (du.T @ a).to(call.up_weight.dtype)  # [H, R]                         (6)
    if need_up_bias:
        d_up_bias = du.sum(0).to(call.up_bias.dtype)  # [H]                          (7)
    if need_scaling:
        u = F.linear(a, call.up_weight.to(dtype), _to(call.up_bias, dtype))
        wide = torch.promote_types(dtype, torch.float32)  # one long sum: half precision would lose it
        d_scaling = (dy.to(wide) * u.to(wide)).sum(0)  # [H]                         (8)
        if call.scaling.numel() == 1:
            d_scaling = d_scaling.sum(0, keepdim=True)
        d_scaling = d_scaling.to(call.scaling.dtype)
    if need_x or need_down or need_down_bias:
        dz = (du @ call.up_weight.to(dtype)) * activation.derivative(z)  # [T, R]    (9)
    if need_down:
        d_down = (dz.T @ x.to(dtype)).to(call.down_weight.dtype)  # [R, H]           (10)
    if need_down_bias:
        d_down_bias = dz.sum(0).to(call.down_bias.dtype)  # [R]                      (11)
    if need_x:
        dx = dz @ call.down_weight.to(dtype)  # [T, H]                               (12)
        dx = (dx + dy if call.add_input else dx).to(call.x.dtype).reshape(call.x.shape)
    return dx, d_down, d_up, d_down_bias, d_up_bias, d_scaling


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
