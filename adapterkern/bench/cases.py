"""The cases that are timed: a `BenchCase` is one row of work, and presets span grids of them."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkern.activations import canonical_name
from adapterkern.parity import SHORT_NAMES
from adapterkern.spec import NORMS

MODES = ("forward", "backward", "step")
EPS = 1e-5  # of every norm
DTYPES = {short: dtype for dtype, short in SHORT_NAMES.items()}


@dataclass(frozen=True)
class BenchCase:
    """One workload. `str(case)` is its id, for example forward-bf16-gelu-T16384-H1024-R64.

    mode: forward (no gradient recorded, nothing saved), backward (gradients of x and of every
    parameter, from a saved forward) or step (a recording forward and its backward).
    norm: layer or rms: the adapter between a block's sublayer and its norm, norm(x + skip +
    adapter), as post-norm models have it. y is then the normed, and skip has a gradient too.
    """

    hidden_size: int
    bottleneck_size: int
    tokens: int
    dtype: str = "bf16"
    activation: str = "gelu"
    mode: str = "forward"
    norm: str = "none"

    def __post_init__(self) -> None:
        """Refuse what cannot be a workload.

        Raises:
            ValueError: a size below 1, or an unknown dtype, mode, norm or activation.
        """
        if min(self.hidden_size, self.bottleneck_size, self.tokens) < 1:
            raise ValueError(
                "hidden size, bottleneck size and tokens must be at least 1, "
                f"got {self.hidden_size}, {self.bottleneck_size} and {self.tokens}."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}.\n  hint: {', '.join(DTYPES)}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}.\n  hint: {', '.join(MODES)}")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}.\n  hint: {', '.join(NORMS)}")
        canonical_name(self.activation)

    def __str__(self) -> str:
        norm = "" if self.norm == "none" else f"-{self.norm}_norm"
        return f"{self.mode}-{self.dtype}-{self.activation}-T{self.tokens}-{self.shape}{norm}"

    @property
    def shape(self) -> str:
        """The part of the id that a model fixes."""
        return f"H{self.hidden_size}-R{self.bottleneck_size}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize

    def draw(self, device: torch.device | str, seed: int = 0) -> "Inputs":
        """Draw random inputs on `device`, the same for all providers; z, u and x are of order 1."""
        generator = torch.Generator(device).manual_seed(seed)
        tokens, hidden, bottleneck = self.tokens, self.hidden_size, self.bottleneck_size

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return (values * scale).to(self.torch_dtype)

        parameters = {
            "down_weight": normal(bottleneck, hidden, scale=hidden**-0.5),
            "up_weight": normal(hidden, bottleneck, scale=2 * bottleneck**-0.5),
            "down_bias": normal(bottleneck, scale=0.5),
            "up_bias": normal(hidden, scale=0.5),
        }
        x, dy = normal(tokens, hidden), normal(tokens, hidden)
        if self.norm != "none":
            parameters["skip"] = normal(tokens, hidden)
            parameters["norm_weight"] = 1 + normal(hidden, scale=0.2)
            if self.norm == "layer":
                parameters["norm_bias"] = normal(hidden, scale=0.5)
        return Inputs(x, dy, parameters)


@dataclass(frozen=True)
class Inputs:
    """x [T, H], the gradient of y [T, H], and the parameters by their names in `AdapterCall`; in a
    case with a norm the skip [T, H] is among these."""

    x: Tensor
    dy: Tensor
    parameters: dict[str, Tensor]


@dataclass(frozen=True)
class Preset:
    """The width of a published model and bottlenecks in use on it."""

    hidden_size: int
    bottleneck_sizes: tuple[int, ...]


PRESETS = {
    "bert-base": Preset(768, (48, 64)),
    "roberta-large": Preset(1024, (64,)),
    "gpt2-medium": Preset(1024, (64, 112)),
    "llama-7b": Preset(4096, (64, 256)),
    "llama-70b": Preset(8192, (128, 512)),
}

# A decode batch, a micro-batch or prompt, and a full training batch; the CPU's take seconds.
TOKENS = {"cuda": (16, 2048, 16384), "cpu": (16, 128, 512)}
SHAPES = ((768, 48), (1024, 64), (4096, 64))
QUICK_TOKENS = {"cuda": (128, 16384), "cpu": (128,)}
QUICK_SHAPES = {"cuda": ((1024, 64),), "cpu": ((768, 48),)}
DTYPE = {"cuda": "bf16", "cpu": "fp32"}


def preset_shapes(names: Iterable[str]) -> list[tuple[int, int]]:
    """Return (hidden size, bottleneck size) of the presets, each once.

    Raises:
        ValueError: an unknown name; the message lists the names that are known.
    """
    shapes = []
    for name in names:
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(f"unknown preset {name!r}.\n  hint: known presets are {known}.")
        preset = PRESETS[name]
        shapes += [(preset.hidden_size, size) for size in preset.bottleneck_sizes]
    return list(dict.fromkeys(shapes))


def grid(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    modes: Iterable[str] = ("forward", "step"),
    dtypes: Iterable[str] = ("bf16",),
    activations: Iterable[str] = ("gelu",),
    norm: str = "none",
) -> list[BenchCase]:
    """Return every combination, the largest number of tokens last."""
    combinations = itertools.product(shapes, dtypes, activations, modes, sorted(tokens))
    return [
        BenchCase(hidden, bottleneck, count, dtype, canonical_name(activation), mode, norm)
        for (hidden, bottleneck), dtype, activation, mode, count in combinations
    ]
