"""Modules of other libraries, written after their interfaces: attributes and maths."""

import math

import torch
from torch import nn
from torch.nn import functional as F

H, R = 12, 5


def swish(z):
    return z * torch.sigmoid(z)


def gelu_new(z):
    return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


swish.__module__ = gelu_new.__module__ = "opendelta.delta_models.layers.activations"


class Swish(nn.SiLU):
    """NeMo's."""


Swish.__module__ = "nemo.collections.common.parts.activations"


class OpenDeltaLayer(nn.Module):
    """OpenDelta's AdapterLayer: parameters appear with the first input; functions are plain."""

    def __init__(self, function=gelu_new) -> None:
        super().__init__()
        self.bottleneck_dim = R
        self.instantiated = False
        self.function = function

    def instantiate(self, hidden_dim: int) -> None:
        activation = nn.Module()
        activation.f = self.function
        self.modulelist = nn.Sequential()
        self.modulelist.add_module("down_proj", nn.Linear(hidden_dim, R))
        self.modulelist.add_module("non_linear", activation)
        self.modulelist.add_module("up_proj", nn.Linear(R, hidden_dim))
        self.instantiated = True

    def post_forward(self, output):
        layers = self.modulelist
        return output + layers.up_proj(layers.non_linear.f(layers.down_proj(output)))


class SpeechBrainLinear(nn.Module):
    """SpeechBrain's HoulsbyAdapterLinear."""

    def __init__(self, bias: bool = True, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.pretrained_linear = nn.Linear(H, H)
        self.adapter_down_proj = nn.Linear(H, R, bias=bias)
        self.adapter_up_proj = nn.Linear(R, H, bias=bias)
        self.activation = activation or nn.SiLU()

    def forward(self, x):
        x = self.pretrained_linear(x)
        return self.adapter_up_proj(self.activation(self.adapter_down_proj(x))) + x


class LlmAdaptersLinear(nn.Linear):
    """The bottleneck Linear of LLM-Adapters, in its three places."""

    def __init__(self, adapter_type: str, scaling: float | nn.Parameter = 1.0) -> None:
        super().__init__(H, H)
        self.adapter_type = adapter_type
        self.adapter_dropout = nn.Dropout(0.2)
        self.adapter_down = nn.Linear(H, R, bias=False)
        self.adapter_up = nn.Linear(R, H, bias=False)
        self.act_fn = nn.Tanh()
        self.adapter_scaling = scaling

    def adapt(self, x):
        inner = self.act_fn(self.adapter_down(self.adapter_dropout(x)))
        return self.adapter_up(inner) * self.adapter_scaling

    def forward(self, x):
        if self.adapter_type == "mh_adapter":
            return F.linear(self.adapt(x) + x, self.weight, self.bias)
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapt(y if self.adapter_type == "output_adapter" else x)


class NemoAdapter(nn.Module):
    """NeMo's LinearAdapter; without a norm as users subclass it."""

    def __init__(self, norm_position: str | None) -> None:
        super().__init__()
        layers = [nn.Linear(H, R, bias=False), Swish(inplace=True), nn.Linear(R, H, bias=False)]
        if norm_position == "pre":
            layers.insert(0, nn.LayerNorm(H))
        elif norm_position == "post":
            layers.append(nn.LayerNorm(H))
        self.module = nn.Sequential(*layers)
        self.norm_position = norm_position
        self.dropout = None

    def forward(self, x):
        return self.module(x)


def check(module, ours, theirs) -> None:
    """Same output, and gradients that arrive in the other library's parameters."""
    output, expected = ours(), theirs()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    parameters = list(module.parameters())
    found = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
