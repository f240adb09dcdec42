"""The operation as a function: one call made, a backend chosen, the op run."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from adapterkern import _torch, dispatch, ops, reference
from adapterkern.results import Outputs, given_of
from adapterkern.spec import AdapterCall, make_call, with_norm


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    residual: str | Tensor | None = "input",
    skip: Tensor | None = None,
    activation: str = "gelu",
    scaling: float | Tensor = 1.0,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Bottleneck adapter, fused: residual + skip + scaling * up(act(down(x))).

        y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up)

    Args:
        x: [..., H], float32 | float16 | bfloat16 | float64; any strides (a non-unit last stride is
            copied once).
        down_weight: [R, H], on the device of `x` and in its dtype; float32 master weights may meet
            a half-precision `x` and are converted on load. Under autocast the products run in the
            autocast dtype.
        up_weight: [H, R], as `down_weight`.
        down_bias, up_bias: [R] and [H], each optional on its own.
        residual: "input" adds `x`; a tensor [..., H] is added, of any floating dtype (float64 with
            float64 alone); None adds nothing.
        skip: [..., H], a second tensor to add: the block's own residual stream, folded into the
            same pass.
        activation: gelu (erf) | gelu_tanh (gelu_new) | relu | silu (swish) | tanh | sigmoid |
            leaky_relu (leakyrelu, slope 0.01) | identity.
        scaling: a float, or a learned tensor of shape [1] or [H].
        dropout: probability of zeroing an element of the scaled up-projection, applied whenever it
            is positive (so pass 0 for evaluation). The PyTorch reference runs such a call.
        backend: "auto" | "cuda" | "triton" | "reference". A named backend raises instead of falling
            back.

    Returns:
        [..., H], contiguous, in the dtype that the eager composition promotes to, the products'
        dtype, widened by the residual, skip and a learned scaling.

    Raises:
        TypeError: an argument that must be a tensor or a number is not.
        ValueError: shapes, dtypes or devices disagree, or a name is unknown; the message lists all
            problems of the tensors and the likely cure.
        BackendUnsupportedError: the named backend cannot run the call; every reason is listed.

    Differentiable in x, residual, skip, the weights, the biases and scaling; only gradients that
    are asked for are computed, and repeated runs give the same bits. Under functorch transforms,
    forward-mode AD and differentiated twice, plain PyTorch operations run instead; torch.export,
    torch.jit.trace and exports to ONNX write those, torch.export only where no kernel is named.

    Source: Houlsby et al. 2019, arXiv:1902.00751; derivation in docs/math.md (1)-(12).
    """
    tensors = x, down_weight, up_weight, down_bias, up_bias, residual, skip, scaling
    if _is_overridden(*tensors):
        return handle_torch_function(
            bottleneck_adapter, tensors, *tensors[:5], residual=residual, skip=skip,
            activation=activation, scaling=scaling, dropout=dropout, backend=backend,
        )  # fmt: skip
    call = make_call(
        x, down_weight, up_weight, down_bias, up_bias, residual, skip, activation, scaling, dropout
    )
    return given_of(run_call(call, backend))


@overload
def bottleneck_adapter_norm(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    norm_weight: Tensor | None,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    residual: str | Tensor | None = "input",
    skip: Tensor | None = None,
    activation: str = "gelu",
    scaling: float | Tensor = 1.0,
    dropout: float = 0.0,
    norm: str = "layer",
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    prenorm: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def bottleneck_adapter_norm(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    norm_weight: Tensor | None,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    residual: str | Tensor | None = "input",
    skip: Tensor | None = None,
    activation: str = "gelu",
    scaling: float | Tensor = 1.0,
    dropout: float = 0.0,
    norm: str = "layer",
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    prenorm: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def bottleneck_adapter_norm(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    norm_weight: Tensor | None,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    residual: str | Tensor | None = "input",
    skip: Tensor | None = None,
    activation: str = "gelu",
    scaling: float | Tensor = 1.0,
    dropout: float = 0.0,
    norm: str = "layer",
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    prenorm: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Bottleneck adapter and the norm behind it, in one pass over memory.

        stream = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up)
        normed = (stream - mean) * rstd * (norm_weight + weight_offset) + norm_bias

    mean and 1 / rstd^2 - eps are mean and variance of a token's features; for norm="rms" the mean
    is left out and the mean of the squares takes the variance's place.

    Args:
        x, down_weight, up_weight, down_bias, up_bias, residual, skip, activation, scaling, dropout:
            as in `bottleneck_adapter`.
        norm_weight, norm_bias: [H], each optional on its own, any floating dtype (float64 with
            float64 alone).
        norm: "layer" (LayerNorm) | "rms" (RMSNorm).
        eps: above 0, added to the variance or to the mean of the squares.
        weight_offset: 1.0 for norms that store their weight less 1, as Gemma's do.
        cast_before_weight: whether the standardized stream is rounded to the dtype of the stream
            before norm_weight multiplies it, as Llama's norm does.
        prenorm: whether to return the stream too.
        backend: as in `bottleneck_adapter`. Under "auto", a call whose norm no kernel takes runs
            the op of `bottleneck_adapter` and torch's norm behind it, with a warning on a GPU.

    Returns:
        normed [..., H], contiguous, in the dtype of the stream widened by the norm's parameters;
        with `prenorm`, the pair (normed, stream).

    Raises:
        TypeError, ValueError, BackendUnsupportedError: as `bottleneck_adapter`.

    Differentiable as `bottleneck_adapter`, and in norm_weight and norm_bias.

    Source: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467; derivation
    in docs/math.md (16)-(23).
    """
    tensors: Any = x, down_weight, up_weight, norm_weight, down_bias, up_bias, norm_bias
    if _is_overridden(*tensors, residual, skip, scaling):
        function: Any = bottleneck_adapter_norm  # whose overloads say nothing of a Proxy
        return handle_torch_function(
            function, (*tensors, residual, skip, scaling), *tensors,
            residual=residual, skip=skip, activation=activation, scaling=scaling, dropout=dropout,
            norm=norm, eps=eps, weight_offset=weight_offset,
            cast_before_weight=cast_before_weight, prenorm=prenorm, backend=backend,
        )  # fmt: skip
    call = make_call(
        x, down_weight, up_weight, down_bias, up_bias, residual, skip, activation, scaling, dropout
    )
    call = with_norm(
        call, norm_weight, norm_bias, norm, eps, weight_offset, cast_before_weight, prenorm
    )
    outputs = run_call(call, backend)
    return (outputs.normed, outputs.y) if prenorm else outputs.normed  # type: ignore[return-value]


def _is_overridden(*arguments: object) -> bool:
    """Whether an argument takes the call itself, as if it were a function of torch: a Proxy of
    torch.fx makes one node of it. A class of tensors does not, which is asked for every operation,
    as it is in plain layers.
    """
    return (
        has_torch_function_variadic(*arguments)
        and not torch.compiler.is_compiling()
        and not any(isinstance(t, Tensor) and _torch.is_subclass(t) for t in arguments)
    )


def run_call(call: AdapterCall, backend: str = "auto") -> Outputs:
    """Validate, choose a backend, run."""
    decision = dispatch.select(call, backend)
    if decision.plain:
        return reference.forward(call)[0]
    if decision.apart:  # torch's norm is quicker than the reference's, and its gradient too
        y = given_of(ops.run(call.without_norm(), decision.backend))
        return Outputs(y, reference.normalized(call, y))
    return ops.run(call, decision.backend)
