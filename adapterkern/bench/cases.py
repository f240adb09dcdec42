"""The cases that are timed: a `BenchCase` is one row of work, and presets span grids of them."""

import itertools
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkern.activations import canonical_name
from adapterkern.parity import SHORT_NAMES
from adapterkern.spec import NORMS

MODES = ("forward", "backward", "step")
# How the sequences of a batch choose among many adapters.
MIXES = ("even", "zipf", "none")
EPS = 1e-5  # of every norm
DTYPES = {short: dtype for dtype, short in SHORT_NAMES.items()}


@dataclass(frozen=True)
class BenchCase:
    """One workload. `str(case)` is its id, for example forward-bf16-gelu-T16384-H1024-R64.

    mode: forward (no gradient recorded, nothing saved), backward (gradients of x and of every
    parameter, from a saved forward) or step (a recording forward and its backward).
    norm: layer or rms: the adapter between a block's sublayer and its norm, norm(x + skip +
    adapter), as post-norm models have it. y is then the normed, and skip has a gradient too.
    adapters: how many one batch mixes; 0: one adapter, without a routing.
    mix: even: a sequence each; zipf: four sequences for each adapter there is, of which the k-th
    adapter has about 1/k as many as the first, and at least one; none: the adapters are there, and
    no token takes one. In all of them the order of the sequences is a random one.
    """

    hidden_size: int
    bottleneck_size: int
    tokens: int
    dtype: str = "bf16"
    activation: str = "gelu"
    mode: str = "forward"
    norm: str = "none"
    adapters: int = 0
    mix: str = "even"

    def __post_init__(self) -> None:
        """Refuse what cannot be a workload.

        Raises:
            ValueError: a size below 1, an unknown dtype, mode, norm, mix or activation, or many
                adapters with a norm or with tokens that their sequences cannot share.
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
        if self.mix not in MIXES:
            raise ValueError(f"unknown mix {self.mix!r}.\n  hint: {', '.join(MIXES)}")
        if self.adapters < 0 or (self.adapters and self.norm != "none"):
            raise ValueError(
                "adapters must be 0, or at least 1 and without a norm, "
                f"got {self.adapters} and norm {self.norm!r}."
            )
        if self.adapters and self.tokens % self.sequences:
            raise ValueError(
                f"{self.tokens} tokens do not make {self.sequences} sequences of one length, which "
                f"{self.adapters} adapters in the mix {self.mix!r} take."
            )
        canonical_name(self.activation)

    def __str__(self) -> str:
        behind = "" if self.norm == "none" else f"-{self.norm}_norm"
        if self.adapters:
            behind = f"-A{self.adapters}" + ("" if self.mix == "even" else f"_{self.mix}")
        return f"{self.mode}-{self.dtype}-{self.activation}-T{self.tokens}-{self.shape}{behind}"

    @property
    def kind(self) -> str:
        """one, norm or many: what a provider has to compute."""
        if self.adapters:
            return "many"
        return "one" if self.norm == "none" else "norm"

    @property
    def used_adapters(self) -> int:
        """The adapters whose weights a call needs."""
        if self.kind != "many":
            return 1
        return 0 if self.mix == "none" else self.adapters

    @property
    def sequences(self) -> int:
        """How many there are, each with one adapter."""
        return self.adapters * (4 if self.mix == "zipf" else 1)

    @property
    def rows(self) -> int:
        """The tokens of a sequence."""
        return self.tokens // max(1, self.sequences)

    def adapter_of_sequences(self) -> list[int]:
        """The adapter of each sequence, -1 for none."""
        if self.mix == "none":
            return [-1] * self.sequences
        shares = [1 / place for place in range(1, self.adapters + 1)]
        spare = 0 if self.mix == "even" else self.sequences - self.adapters
        counts = [1 + int(spare * share / sum(shares)) for share in shares]
        counts[0] += self.sequences - sum(counts)  # what rounding down has left
        chosen = [adapter for adapter, count in enumerate(counts) for _ in range(count)]
        random.Random(self.sequences).shuffle(chosen)
        return chosen

    def ids(self, device: torch.device | str) -> Tensor:
        """The adapter of each token, [T] int32."""
        chosen = torch.tensor(self.adapter_of_sequences(), dtype=torch.int32, device=device)
        return chosen.repeat_interleave(self.rows)

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

        slots, plural = ((self.adapters,), "s") if self.adapters else ((), "")
        biases = "es" if self.adapters else ""
        parameters = {
            f"down_weight{plural}": normal(*slots, bottleneck, hidden, scale=hidden**-0.5),
            f"up_weight{plural}": normal(*slots, hidden, bottleneck, scale=2 * bottleneck**-0.5),
            f"down_bias{biases}": normal(*slots, bottleneck, scale=0.5),
            f"up_bias{biases}": normal(*slots, hidden, scale=0.5),
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
    case with a norm the skip [T, H] is among these. Those of many adapters are the stacks of
    `GroupedCall`."""

    x: Tensor
    dy: Tensor
    parameters: dict[str, Tensor]

    def named(self, leaves: Iterable[str]) -> tuple[str, ...]:
        """Those of the names that `parameter` knows, which tell a provider's formula."""
        return tuple(name for name in leaves if parameter(self.parameters, name) is not None)


def parameter(parameters: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The parameter of that name; "down_weights.3" is what the fourth adapter has of a stack."""
    stack, _, slot = name.partition(".")
    found = parameters.get(stack)
    return found if found is None or not slot else found[int(slot)]


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
# Many adapters: decoding, which reads every adapter for one token, and prompts.
ADAPTERS = {"cuda": (1, 4, 16, 64), "cpu": (1, 4, 16)}
ROWS = {"cuda": (1, 32, 128), "cpu": (1, 32)}
MANY_SHAPES = {"cuda": ((1024, 64), (4096, 64)), "cpu": QUICK_SHAPES["cpu"]}


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


def grid_of_many(
    shapes: Iterable[tuple[int, int]],
    adapters: Iterable[int],
    rows: Iterable[int],
    mixes: Iterable[str],
    modes: Iterable[str] = ("forward", "step"),
    dtypes: Iterable[str] = ("bf16",),
    activations: Iterable[str] = ("gelu",),
) -> list[BenchCase]:
    """Return every combination, where each adapter has so many tokens on the average. Zipf's mix is
    left out where there is one adapter, or rows that are no multiple of 4: it has four sequences an
    adapter.
    """
    return [
        BenchCase(
            *shape, number * each, dtype, canonical_name(activation), mode,
            adapters=number, mix=mix,
        )
        for shape, dtype, activation, mode, mix, number, each in itertools.product(
            shapes, dtypes, activations, modes, mixes, sorted(adapters), sorted(rows)
        )
        if mix != "zipf" or (number > 1 and each % 4 == 0)
    ]  # fmt: skip
