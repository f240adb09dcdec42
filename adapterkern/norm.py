"""The norm behind an adapter in plain PyTorch, equations (16) to (22) of docs/math.md.

`normalized` is torch's own where torch has that norm, and differentiable by autograd as it stands.
`backward` is the derivation that the kernels follow. Neither looks at autocast.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterkern.spec import AdapterCall, Needs


def normalized(call: AdapterCall, y: Tensor) -> Tensor:
    """The norm of y [..., H] in `AdapterCall.normed_dtype`, equations (16) to (18)."""
    dtype, weight, bias = call.normed_dtype, call.norm_weight, call.norm_bias
    plain = not (call.weight_offset or call.cast_before_weight)
    if plain and (call.norm == "layer" or bias is None):
        shape = (call.hidden_size,)
        weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
        if call.norm == "layer":
            return F.layer_norm(y.to(dtype), shape, weight, bias, call.eps)
        return F.rms_norm(y.to(dtype), shape, weight, call.eps)
    rows = _wide(y)
    normed = _rounded(call, _standardized(rows, *statistics(call, rows)), y.dtype)
    if weight is not None:
        normed = normed * _factor(call, normed.dtype)
    if bias is not None:
        normed = normed + bias
    return normed.to(dtype)


def statistics(call: AdapterCall, y: Tensor) -> tuple[Tensor | None, Tensor]:
    """mean [...], None for an RMSNorm, and rstd [...] of y [..., H], in float32 or float64."""
    rows, mean = _wide(y), None
    if call.norm == "layer":
        mean = rows.mean(-1)
        rows = rows - mean.unsqueeze(-1)
    return mean, (rows.square().mean(-1) + call.eps).rsqrt()


def backward(
    call: AdapterCall,
    stream: Tensor | None,
    statistics_of_stream: tuple[Tensor | None, Tensor | None],
    d_normed: Tensor,
    d_stream: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The gradient of the stream, in its shape and dtype and where `needs.sum`, and those of the
    norm's parameters in float32 or float64, equations (19) to (22).

    Args:
        stream: [..., H], y as the forward returned it; its `statistics` [T] as the forward saved
            them, or computed anew where they are absent.
        d_normed, d_stream: [..., H], the gradients of the outputs; the second may be absent.
    """
    found: dict[str, Tensor] = {}
    dn = _wide(d_normed.reshape(-1, call.hidden_size))
    if needs.norm_bias:
        found["norm_bias"] = dn.sum(0)
    if stream is None:
        return None, found
    rows = _wide(stream.reshape(-1, call.hidden_size))
    mean, rstd = statistics_of_stream
    if rstd is None:
        mean, rstd = statistics(call, rows)
    xhat = _standardized(rows, mean, rstd)
    if needs.norm_weight:
        found["norm_weight"] = (dn * _rounded(call, xhat, stream.dtype)).sum(0)
    if not needs.sum:
        return None, found
    g = dn if call.norm_weight is None else dn * _factor(call, dn.dtype)
    ds = g - xhat * (g * xhat).mean(-1, keepdim=True)
    if call.norm == "layer":
        ds = ds - g.mean(-1, keepdim=True)
    ds = ds * rstd.unsqueeze(-1)
    if d_stream is not None:
        ds = ds + d_stream.reshape(-1, call.hidden_size)
    return ds.to(stream.dtype).reshape(stream.shape), found


def _standardized(rows: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    centered = rows if mean is None else rows - mean.unsqueeze(-1)
    return centered * rstd.unsqueeze(-1)


def _rounded(call: AdapterCall, xhat: Tensor, dtype: torch.dtype) -> Tensor:
    """What norm_weight multiplies."""
    return xhat.to(dtype).to(xhat.dtype) if call.cast_before_weight else xhat


def _factor(call: AdapterCall, dtype: torch.dtype) -> Tensor:
    assert call.norm_weight is not None
    return call.norm_weight.to(dtype) + call.weight_offset


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
