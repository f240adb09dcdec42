"""The adapter as composed from torch alone, and random problems for it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkern.activations import ACTIVATIONS as TABLE

# torch's own modules, found by their names.
_MODULES = {name.lower(): module for name, module in vars(nn).items()}
ACTIVATIONS = {
    name: nn.GELU(approximate="tanh") if name == "gelu_tanh" else _MODULES[name.replace("_", "")]()
    for name in TABLE
}


def eager_adapter(
    x, down_weight, up_weight, down_bias=None, up_bias=None, *,
    residual="input", skip=None, activation="gelu", scaling=1.0,
):  # fmt: skip
    u = F.linear(x, down_weight, down_bias)
    u = F.linear(ACTIVATIONS[activation](u), up_weight, up_bias)
    if isinstance(scaling, Tensor) or scaling != 1.0:
        u = u * scaling
    if residual is not None:
        u = u + (x if isinstance(residual, str) else residual)
    return u if skip is None else u + skip


def eager_adapter_norm(
    x, down_weight, up_weight, norm_weight=None, down_bias=None, up_bias=None, norm_bias=None, *,
    norm="layer", eps=1e-5, prenorm=False, **options,
):  # fmt: skip
    stream = eager_adapter(x, down_weight, up_weight, down_bias, up_bias, **options)
    if norm == "layer":
        normed = F.layer_norm(stream, stream.shape[-1:], norm_weight, norm_bias, eps)
    else:
        normed = F.rms_norm(stream, stream.shape[-1:], norm_weight, eps)
    return (normed, stream) if prenorm else normed


class EagerAdapter(nn.Module):
    """The plain module; its parameters carry the names of a `BottleneckAdapter`."""

    def __init__(self, hidden_size, bottleneck_size, activation="gelu"):
        super().__init__()
        self.down_proj = nn.Linear(hidden_size, bottleneck_size)
        self.up_proj = nn.Linear(bottleneck_size, hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        return x + self.up_proj(self.activation(self.down_proj(x)))


def tensors(
    shape=(3, 5), hidden=10, bottleneck=4, dtype=torch.float64, *,
    bias=True, residual=False, skip=False, scaling=None, norm=False, seed=0,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of one call by argument name, all asking for a gradient. `scaling`: its size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (*shape, hidden),
        "down_weight": (bottleneck, hidden),
        "up_weight": (hidden, bottleneck),
        "down_bias": (bottleneck,) if bias else None,
        "up_bias": (hidden,) if bias else None,
        "residual": (*shape, hidden) if residual else None,
        "skip": (*shape, hidden) if skip else None,
        "scaling": (scaling,) if scaling else None,
        "norm_weight": (hidden,) if norm else None,
        "norm_bias": (hidden,) if norm else None,
    }
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        .mul_(0.5)
        .to(dtype)
        .requires_grad_()
        for name, size in shapes.items()
        if size is not None
    }


def gradients(function, arguments: dict, grad_output=None, wanted=None, **options):
    """(y, {name: gradient}) of a call; without `grad_output`, gradients of the sum of squares."""
    leaves = {
        name: tensor.detach().requires_grad_(wanted is None or name in wanted)
        for name, tensor in arguments.items()
    }
    y = function(**leaves, **options)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    target = (y, grad_output) if grad_output is not None else (y.square().sum(), None)
    found = torch.autograd.grad(target[0], [leaves[name] for name in names], target[1])
    return y.detach(), dict(zip(names, found, strict=True))
