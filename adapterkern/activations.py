"""The one table of activations: name, aliases, value and gradient, in plain PyTorch.

Every backend names the activations it implements; the tests compare each with this table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LEAKY_SLOPE = 0.01

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One elementwise activation a = value(z), and dz = gradient(z, da), which is da act'(z).

    The gradients are those that autograd takes for the values, in one pass each. They put Inf, NaN
    and the kinks where autograd puts them: relu selects, da or 0, and all others multiply.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    aliases: tuple[str, ...] = ()


def _silu_gradient(z: Tensor, da: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (z.requires_grad or da.requires_grad):
        s = torch.sigmoid(z)  # torch has no derivative of silu_backward
        return da * s * (1 + z * (1 - s))
    return _aten.silu_backward(da, z)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("gelu", F.gelu, lambda z, da: _aten.gelu_backward(da, z)),
        Activation(
            "gelu_tanh",
            lambda z: F.gelu(z, approximate="tanh"),
            lambda z, da: _aten.gelu_backward(da, z, approximate="tanh"),
            ("gelu_new",),
        ),
        Activation("relu", torch.relu, lambda z, da: _aten.threshold_backward(da, z, 0)),
        Activation("silu", F.silu, _silu_gradient, ("swish",)),
        Activation("tanh", torch.tanh, lambda z, da: _aten.tanh_backward(da, torch.tanh(z))),
        Activation(
            "sigmoid", torch.sigmoid, lambda z, da: _aten.sigmoid_backward(da, torch.sigmoid(z))
        ),
        Activation(
            "leaky_relu",
            F.leaky_relu,
            lambda z, da: _aten.leaky_relu_backward(da, z, LEAKY_SLOPE, False),
            ("leakyrelu",),
        ),
        Activation("identity", lambda z: z, lambda z, da: da),
    )
}

_CANONICAL = {alias: a.name for a in ACTIVATIONS.values() for alias in (a.name, *a.aliases)}


def canonical_name(name: str) -> str:
    """The table's name for `name` or one of its aliases, in letters of either case.

    Raises:
        TypeError: `name` is not a string.
        ValueError: the name is not in the table; the message lists the names that are.
    """
    if not isinstance(name, str):
        raise TypeError(f'activation must be a name, such as "gelu", got {name!r}.')
    found = _CANONICAL.get(name) or _CANONICAL.get(name.lower())
    if found is None:
        known = ", ".join(
            a.name + (f" (alias {', '.join(a.aliases)})" if a.aliases else "")
            for a in ACTIVATIONS.values()
        )
        raise ValueError(f"unknown activation {name!r}.\n  hint: known activations are {known}.")
    return found
