"""The operation as a function: defaults, autocast, validation, dispatch."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adapterkern import dispatch, ops, reference
from adapterkern.activations import canonical_name
from adapterkern.spec import AdapterCall, AdapterSpec


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
        x: [..., H], float32 | float16 | bfloat16 | float64; any strides (a non-unit last stride is copied once).
        down_weight: [R, H], on the device of `x` and in its dtype; float32 master weights may meet a
            half-precision `x` and are converted on load. Under autocast the products run in the autocast dtype.
        up_weight: [H, R], as `down_weight`.
        down_bias, up_bias: [R] and [H], each optional on its own.
        residual: "input" adds `x`; a tensor [..., H] of any floating dtype is added; None adds nothing.
        skip: [..., H], a second tensor to add: the block's own residual stream, folded into the same pass.
        activation: gelu (erf) | gelu_tanh (gelu_new) | relu | silu (swish) | tanh | sigmoid |
            leaky_relu (leakyrelu, slope 0.01) | identity.
        scaling: a float, or a learned tensor of shape [1] or [H].
        dropout: probability of zeroing an element of the scaled up-projection, applied whenever it is positive
            (so pass 0 for evaluation). The PyTorch reference runs such a call.
        backend: "auto" | "cuda" | "triton" | "reference". A named backend raises instead of falling back.

    Returns:
        [..., H], contiguous, in the dtype that the eager composition promotes to: the products' dtype, widened
        by the residual, skip and a learned scaling.

    Raises:
        TypeError: an argument that must be a tensor is not.
        ValueError: shapes, dtypes or devices disagree, or a name is unknown; the message lists all problems of
            the tensors and the likely cure.
        BackendUnsupportedError: the named backend cannot run the call; every reason is listed.

    Differentiable in x, residual, skip, the weights, the biases and scaling; only gradients that are asked for are
    computed, and repeated runs give the same bits. Under functorch transforms, forward-mode AD and
    differentiated twice, plain PyTorch operations run instead.

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
    if add_input:
        residual = None
    learned = isinstance(scaling, Tensor)
    return AdapterCall(
        x,
        down_weight,
        up_weight,
        down_bias,
        up_bias,
        residual,
        skip,
        scaling if learned else None,
        1.0 if learned else float(scaling),
        add_input,
        canonical_name(activation),
        _compute_dtype(x),
        dropout,
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which eager would run the two linear layers: autocast's where it is on, else x's."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}.")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device) if x.is_floating_point() else x.dtype
    return x.dtype


def run_call(call: AdapterCall, backend: str = "auto") -> Tensor:
    """Validate, choose a backend, run."""
    name = dispatch.select(_spec_of(call), backend)
    if call.dropout > 0 or _needs_plain_autograd(call):
        return reference.forward(call)[0]
    return ops.run(call, name)


_specs: dict[tuple, AdapterSpec] = {}


def _spec_of(call: AdapterCall) -> AdapterSpec:
    """The validated spec of a call. Everything that validation reads is in the key, so a module's second call
    costs one lookup; while tracing, the key would be guarded on, so nothing is kept."""
    if torch.compiler.is_compiling():
        return call.spec()
    x, down, up, down_bias, up_bias, residual, skip, scaling = call[:8]
    shape = x.shape if isinstance(x, Tensor) else None
    key = (
        x.dtype,
        x.device,
        shape[-1:],
        *_signature(down),
        *_signature(up),
        *_signature(down_bias),
        *_signature(up_bias),
        *_signature(scaling),
        None if residual is None else (residual.dtype, residual.device, residual.shape == shape),
        None if skip is None else (skip.dtype, skip.device, skip.shape == shape),
        *call[8:],
    )
    spec = _specs.get(key)
    if spec is None:
        spec = _specs[key] = call.spec()
    return spec


def _signature(tensor: Tensor | None) -> tuple:
    return (None,) if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _needs_plain_autograd(call: AdapterCall) -> bool:
    """Whether a registered op would give a wrong or no derivative here, or would not understand its input:
    functorch transforms, forward-mode AD, and tensor subclasses with semantics of their own (DTensor)."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(t is not None and type(t) not in _PLAIN and _is_foreign(t) for t in call[:8])


_PLAIN = {Tensor, torch.nn.Parameter}


def _is_foreign(tensor: Tensor) -> bool:
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    tracing = isinstance(tensor, FakeTensor | FunctionalTensor)
    return not tracing and type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
