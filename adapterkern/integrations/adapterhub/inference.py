"""`reference.forward` for calls that need neither a gradient nor a conversion, at eager's own cost.

On the CPU a call of few tokens is host time and little else, and the registered op, its dispatch
and the reference's conversions take several times as long as the five operations themselves.
"""

import torch
from torch import Tensor

from adapterkern import _env, dispatch
from adapterkern.activations import ACTIVATIONS

_linear = torch._C._nn.linear
# On a tensor of our own, without the Python around these in torch.nn.functional.
_IN_PLACE = {
    "relu": torch.relu_,
    "silu": torch._C._nn.silu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}
_BY_DEFAULT = _env.BACKEND == "auto" and not _env.TRITON_INTERPRET


def reference_infers(x: Tensor) -> bool:
    """Whether the reference would run a call with this x, and autograd would record none of it."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and _BY_DEFAULT
        and dispatch._forced is None
        and not torch.compiler.is_compiling()
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
    )


def infer(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    skip: Tensor | None,
    scaling: float | Tensor,
) -> Tensor:
    """y = residual + skip + scaling * up(act(down(x))), as `bottleneck_adapter` has it."""
    z = _linear(x, down_weight, down_bias)
    act_in_place = _IN_PLACE.get(activation)
    if act_in_place is None:
        z = ACTIVATIONS[activation].value(z)
    else:
        act_in_place(z)
    y = _linear(z, up_weight, up_bias)
    if type(scaling) is not float:
        y = y * scaling
    elif scaling != 1.0:
        if residual is None:
            y = y * scaling
        else:
            y, residual = torch.add(residual, y, alpha=scaling), None
    if residual is not None:
        y = y.add_(residual) if residual.dtype == y.dtype else y + residual
    if skip is not None:
        y = y.add_(skip) if skip.dtype == y.dtype else y + skip
    return y
