"""The operation as a function: defaults, autocast, validation, dispatch."""

import torch
from torch import Tensor

from adapterkern import dispatch, ops, reference
from adapterkern.activations import canonical_name
from adapterkern.spec import AdapterCall

_NUMBERS = (float, int)  # a tuple: `float | int` makes a new object at every call


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
    forward-mode AD and differentiated twice, plain PyTorch operations run instead.

    Source: Houlsby et al. 2019, arXiv:1902.00751; derivation in docs/math.md (1)-(12).
    """
    call = make_call(
        x, down_weight, up_weight, down_bias, up_bias, residual, skip, activation, scaling, dropout
    )
    return run_call(call, backend)


def make_call(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: str | Tensor | None,
    skip: Tensor | None,
    activation: str,
    scaling: float | Tensor,
    dropout: float,
) -> AdapterCall:
    """The arguments of `bottleneck_adapter` as one `AdapterCall`."""
    add_input = residual is x
    if isinstance(residual, str):
        if residual != "input":
            raise ValueError(f'residual must be "input", a tensor or None, got {residual!r}.')
        add_input = True
    learned = scaling if isinstance(scaling, Tensor) else None
    if learned is None and not isinstance(scaling, _NUMBERS):
        kind = type(scaling).__name__
        raise TypeError(f"scaling must be a float or a tensor of shape [1] or [H], got a {kind}.")
    return AdapterCall(
        x,
        down_weight,
        up_weight,
        down_bias,
        up_bias,
        None if add_input else residual,  # type: ignore[arg-type]  # a str adds the input
        skip,
        learned,
        1.0 if learned is not None else float(scaling),
        add_input,
        canonical_name(activation),
        compute_dtype(x),
        dropout,
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which eager would run the linear layers: autocast's where it is on, else x's."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}.")
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return x.dtype  # at a third of the time that the name of a device takes
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        # Autocast leaves float64 alone; integers are refused by validation, in their own name.
        castable = x.is_floating_point() and x.dtype != torch.float64
        return torch.get_autocast_dtype(device) if castable else x.dtype
    return x.dtype


def run_call(call: AdapterCall, backend: str = "auto") -> Tensor:
    """Validate, choose a backend, run."""
    decision = dispatch.select(call, backend)
    if decision.plain:
        return reference.forward(call)[0]
    return ops.run(call, decision.backend)
