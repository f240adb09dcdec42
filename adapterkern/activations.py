"""The one table of activations: name, aliases, value and derivative, in plain PyTorch.

Every backend names the activations it implements; the tests compare each with this table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_INV_SQRT_2 = 1 / math.sqrt(2)
_INV_SQRT_2_PI = 1 / math.sqrt(2 * math.pi)
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715  # Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2
LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class Activation:
    """One elementwise activation a = value(z) and its derivative da/dz = derivative(z)."""

    name: str
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    aliases: tuple[str, ...] = ()


def _gelu_derivative(z: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z * _INV_SQRT_2))
    return cdf + z * torch.exp(-0.5 * z * z) * _INV_SQRT_2_PI


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    t = torch.tanh(_SQRT_2_OVER_PI * (z + _TANH_CUBIC * z * z * z))
    inner = _SQRT_2_OVER_PI * (1 + 3 * _TANH_CUBIC * z * z)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * inner


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _sigmoid_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _tanh_derivative(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


def _leaky_relu_derivative(z: Tensor) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("gelu", F.gelu, _gelu_derivative),
        Activation(
            "gelu_tanh",
            lambda z: F.gelu(z, approximate="tanh"),
            _gelu_tanh_derivative,
            ("gelu_new",),
        ),
        Activation("relu", torch.relu, lambda z: (~(z <= 0)).to(z.dtype)),  # 1 at NaN, as autograd
        Activation("silu", F.silu, _silu_derivative, ("swish",)),
        Activation("tanh", torch.tanh, _tanh_derivative),
        Activation("sigmoid", torch.sigmoid, _sigmoid_derivative),
        Activation("leaky_relu", F.leaky_relu, _leaky_relu_derivative, ("leakyrelu",)),
        Activation("identity", lambda z: z, torch.ones_like),
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
