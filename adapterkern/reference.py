"""The semantic truth in plain PyTorch: forward, and a hand-written backward (docs/math.md).

`forward` is differentiable by autograd as it stands; under functorch, forward-mode AD and double
backward it runs in place of the fused operation. `backward` is the derivation that the kernels
follow. Both convert to the compute dtype themselves, so autocast stays out.
`norm` computes what follows where the call has a norm.
"""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterkern import _torch, norm
from adapterkern.activations import ACTIVATIONS
from adapterkern.results import Gradients, Needs, Outputs, Saved, added_gradients, given_of
from adapterkern.spec import AdapterCall, shape_of

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
        with without_autocast(call.x):
            return _with_norm(call, *_forward(call, None, None))
    return _with_norm(call, *_forward(call, down, up))


def normalized(call: AdapterCall, y: Tensor) -> Tensor:
    """The norm of y [..., H]; autocast, which would choose its dtype, stays out."""
    with without_autocast(y):
        return norm.normalized(call, y)


def _with_norm(call: AdapterCall, outputs: Outputs, saved: Saved) -> tuple[Outputs, Saved]:
    if call.norm == "none" or outputs.y is None:
        return outputs, saved
    return outputs._replace(normed=normalized(call, outputs.y)), saved


def forward_of_values(call: AdapterCall) -> tuple[Outputs, Saved]:
    """The same where nothing is to be differentiated, with the statistics of the norm: in full
    precision the product of the up-projection is added to what lies in y, which saves two of the
    passes over [T, H].
    """
    with without_autocast(call.x):
        outputs, saved = _forward_of_values(call)
        if call.norm == "none" or outputs.y is None:
            return outputs, saved
        mean, rstd = norm.statistics(call, outputs.y.reshape(-1, call.hidden_size))
        outputs, saved = _with_norm(call, outputs, saved)
        return outputs, saved._replace(mean=mean, rstd=rstd)


def _forward_of_values(call: AdapterCall) -> tuple[Outputs, Saved]:
    dtype = call.compute_dtype
    residual = call.x if call.add_input else call.residual
    scaled = call.scaling is not None or call.scale != 1.0 or call.dropout > 0
    if residual is None or scaled or dtype.itemsize < 4 or residual.dtype != dtype:
        return _forward(call, None, None)
    z = _pre_activation(call)
    a = ACTIVATIONS[call.activation].value(z)
    y = residual.new_empty(residual.shape)
    if call.up_bias is None:
        y.copy_(residual)
    else:
        torch.add(residual, call.up_bias, out=y)
    y.view(-1, call.hidden_size).addmm_(
        a.reshape(-1, call.bottleneck_size), _to(call.up_weight, dtype).T
    )
    return Outputs(y if call.skip is None else y + call.skip), Saved(z)


def _pre_activation(call: AdapterCall) -> Tensor:
    dtype = call.compute_dtype
    x = _without_gaps(_to(call.x, dtype))
    return F.linear(x, _to(call.down_weight, dtype), _to(call.down_bias, dtype))


def _forward(
    call: AdapterCall,
    down: Callable[[Tensor], Tensor] | None,
    up: Callable[[Tensor], Tensor] | None,
) -> tuple[Outputs, Saved]:
    dtype = call.compute_dtype
    z = _pre_activation(call) if down is None else _to(down(call.x), dtype)
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
    """The gradients in `needs`, equations (5) to (12), and (19) to (22) with a norm.

    Args:
        call: may have outlines in place of what the gradients do not need (`spec.has_values`).
        saved: what forward computed: z [T, R], the pre-activation, and with a norm its statistics
            [T] and the stream [..., H]; each may be absent likewise.
        upstream: the gradients of y and of its norm [..., H], any strides, each in the dtype of
            that; with a norm, that of y may be absent.

    The gradients of residual and skip are that of the sum itself.
    """
    with without_autocast(given_of(upstream)):
        found: dict[str, Tensor] = {}
        d_sum = upstream.y
        if upstream.normed is not None:
            # To be differentiated again, the statistics have to be functions of the stream.
            known = (None, None) if torch.is_grad_enabled() else (saved.mean, saved.rstd)
            d_sum, found = norm.backward(call, saved.stream, known, upstream.normed, d_sum, needs)
        if d_sum is not None:
            dy = d_sum.reshape(-1, call.hidden_size)
            dz, of_up = _backward_of_up(call, saved.z, dy, needs)
            found |= of_up | ({} if dz is None else _backward_of_down(call, dz, needs, dy))
    return _shaped(call, found)._replace(**added_gradients(d_sum, needs))


def backward_of_down(call: AdapterCall, dz: Tensor, needs: Needs) -> Gradients:
    """The part of the gradients in `needs` that a gradient of z [T, R] itself has, equations (10)
    to (12): a second derivative asks for it.
    """
    with without_autocast(dz):
        return _shaped(call, _backward_of_down(call, dz, needs, None))


def _backward_of_up(
    call: AdapterCall, z: Tensor | None, dy: Tensor, needs: Needs
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """dz [T, R], where it is needed, and the gradients of the up-projection and the scaling."""
    dtype, activation = call.compute_dtype, ACTIVATIONS[call.activation]
    found, a, dz = {}, None, None
    if needs.up_weight or needs.scaling:
        assert z is not None
        a = activation.value(z)  # [T, R], recomputed rather than saved
    if needs.dz or needs.up_weight or needs.up_bias:
        du = dy  # [T, H]                                                                   (5)
        if call.scaling is not None:
            du = dy * call.scaling
        elif call.scale != 1.0:
            du = dy * call.scale
        du = _without_gaps(_to(du, dtype))
    if needs.up_weight and a is not None:
        # [H, R], as a^T du: the transpose of a is the smaller one to make.                 (6)
        found["up_weight"] = (a.T @ du).T.contiguous()
    if needs.up_bias:
        found["up_bias"] = du.sum(0)  # [H]                                                 (7)
    if needs.scaling and a is not None:
        u = F.linear(a, _to(call.up_weight, dtype), _to(call.up_bias, dtype))
        # Half precision would lose products and a long sum, and the kernels do not.
        wide = torch.promote_types(dtype, torch.float32)
        d_scaling = (_to(dy, wide) * _to(u, wide)).sum(0)  # [H]                            (8)
        single = call.scaling is not None and shape_of(call.scaling)[0] == 1
        found["scaling"] = d_scaling.sum(0, keepdim=True) if single else d_scaling
    if needs.dz:
        assert z is not None
        da = du @ _to(call.up_weight, dtype)
        dz = activation.gradient(z, da)  # [T, R]                                           (9)
    return dz, found


def _backward_of_down(
    call: AdapterCall, dz: Tensor, needs: Needs, dy: Tensor | None
) -> dict[str, Tensor]:
    """The gradients of the down-projection and of x, which gets `dy` too where it is added."""
    found = {}
    if needs.down_weight:
        x = _to(call.x.reshape(-1, call.hidden_size), dz.dtype)
        found["down_weight"] = dz.T @ x  # [R, H]                                           (10)
    if needs.down_bias:
        found["down_bias"] = dz.sum(0)  # [R]                                               (11)
    if needs.x:
        down_weight = _to(call.down_weight, dz.dtype)
        if dy is None or not call.add_input:
            found["x"] = dz @ down_weight  # [T, H]                                         (12)
        elif dy.dtype == dz.dtype:
            found["x"] = torch.addmm(dy, dz, down_weight)
        else:
            found["x"] = dz @ down_weight + dy
    return found


def _shaped(call: AdapterCall, found: dict[str, Tensor]) -> Gradients:
    """Each gradient in the shape and dtype of its tensor."""
    tensors = call.tensors()
    shaped = {}
    for name, gradient in found.items():
        tensor = tensors[name]
        if tensor is not None:
            shaped[name] = _to(gradient, tensor.dtype).reshape(shape_of(tensor))
    return Gradients(**shaped)


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


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Within the block autocast of the device of x is off."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
