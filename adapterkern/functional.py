"""The operation as a function: one call made, a backend chosen, the op run."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from adapterkern import _torch, dispatch, ops, reference
from adapterkern.spec import AdapterCall, make_call


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
        [..., H], contiguous, in the dtype that the eager composition promotes to: the products'
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
    if (
        has_torch_function_variadic(*tensors)
        and not torch.compiler.is_compiling()
        # A class of tensors is asked for every operation, as it is in plain layers.
        and not any(isinstance(t, Tensor) and _torch.is_subclass(t) for t in tensors)
    ):
        # As for a function of torch: a Proxy of torch.fx makes one node of the call.
        return handle_torch_function(
            bottleneck_adapter, tensors, *tensors[:5], residual=residual, skip=skip,
            activation=activation, scaling=scaling, dropout=dropout, backend=backend,
        )  # fmt: skip
    call = make_call(
        x, down_weight, up_weight, down_bias, up_bias, residual, skip, activation, scaling, dropout
    )
    return run_call(call, backend)


def run_call(call: AdapterCall, backend: str = "auto") -> Tensor:
    """Validate, choose a backend, run."""
    decision = dispatch.select(call, backend)
    if decision.plain:
        return reference.forward(call)[0].y
    return ops.run(call, decision.backend)
