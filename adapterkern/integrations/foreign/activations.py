"""Names of activation modules and functions, recognised by their class: they carry no name."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from adapterkern.activations import LEAKY_SLOPE

# The keys are class names; a class must come from one of _HOMES. `_form` decides between forms.
_BY_CLASS = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Swish": "silu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "LeakyReLU": "leaky_relu",
    "Identity": "identity",
    "LinearActivation": "identity",
}
_BY_FUNCTION: dict[Any, str] = {
    F.leaky_relu: "leaky_relu",
    F.gelu: "gelu",
    F.relu: "relu",
    F.silu: "silu",
    F.tanh: "tanh",
    F.sigmoid: "sigmoid",
    torch.relu: "relu",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
}
# OpenDelta's own plain functions, by name; the module must be one of its own.
_BY_OPENDELTA = {"gelu_new": "gelu_tanh", "swish": "silu"}
_HOMES = (
    "torch.nn.modules.activation",
    "torch.nn.modules.linear",
    "transformers.activations",
    "nemo.",
    "speechbrain.",
)
# Classes whose instances are all alike, so that the hot path needs one lookup.
_UNIFORM: dict[type, str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


def activation_name(function: Any) -> str | None:
    """Return an activation's name in `adapterkern.activations`; None if it has no fused form."""
    uniform = _UNIFORM.get(type(function))
    if uniform is not None:
        return uniform
    if not isinstance(function, nn.Module):
        if str(getattr(function, "__module__", "")).startswith("opendelta."):
            return _BY_OPENDELTA.get(function.__name__)
        return _BY_FUNCTION.get(function)
    kind = type(function)
    if not kind.__module__.startswith(_HOMES):
        return None
    return _form(function, _BY_CLASS.get(kind.__name__))


def _form(module: Any, name: str | None) -> str | None:
    """Return the name that holds for this instance: its options may make another function of it."""
    kind = type(module).__name__
    if kind == "GELUActivation" and module.act is not F.gelu:
        return None
    if kind == "GELU" and module.approximate != "none":
        return "gelu_tanh"
    if kind == "LeakyReLU" and module.negative_slope != LEAKY_SLOPE:
        return None
    if kind == "Swish" and float(getattr(module, "beta", 1)) != 1:
        return None
    return name
