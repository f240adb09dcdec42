"""The grids of cases: for a GPU sizes that reach every kernel form, for a CPU a few small ones."""

import itertools
import math
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch

from adapterkern.parity.cases import Case
from adapterkern.validation import name_of

LEVELS = ("quick", "default", "full")

# Sizes (T, H, R) that make the planners of both backends choose every form, tile and way of
# summing that they know, on GPUs of 108 to 148 SMs; tests/test_parity_forms.py holds that. Row
# blocks of 128 tokens that fill 148 SMs take 14,081, so many tokens go with few features. Some
# sizes divide evenly into tiles, some do not. In the order of work: `quick` runs the first.
_FLOAT32_SIZES = (
    (5, 64, 20), (5, 64, 16), (5, 64, 65), (5, 64, 129), (17, 65, 5), (5, 256, 48), (5, 256, 16),
    (37, 65, 49), (17, 256, 49), (300, 776, 16), (4096, 65, 16), (7168, 64, 16), (7168, 64, 20),
    (7168, 65, 72), (4096, 64, 129), (8193, 65, 49),
)  # fmt: skip
_TF32_SIZES = (
    (5, 64, 48), (5, 65, 5), (5, 64, 128), (17, 64, 20), (17, 64, 65), (5, 256, 16), (5, 256, 48),
    (5, 256, 65), (17, 256, 8), (17, 256, 49), (17, 256, 65), (520, 64, 129), (1537, 129, 16),
    (7168, 64, 16), (7168, 64, 65), (4096, 64, 129), (14100, 65, 64), (14100, 65, 20),
)  # fmt: skip
_HALF_SIZES = (
    (5, 64, 128), (5, 64, 129), (17, 64, 5), (17, 64, 65), (17, 65, 65), (5, 256, 32), (5, 264, 16),
    (5, 264, 65), (17, 64, 129), (5, 512, 20), (5, 512, 65), (17, 256, 49), (5, 1024, 24),
    (5, 1030, 5), (5, 1024, 65), (17, 512, 64), (300, 65, 16), (37, 1030, 48), (777, 65, 49),
    (100, 520, 5), (1037, 64, 20), (1037, 64, 8), (2048, 64, 16), (2048, 64, 20), (2048, 64, 49),
    (2048, 64, 65), (4096, 64, 49), (4096, 64, 32), (4096, 64, 16), (4096, 64, 65), (1280, 256, 65),
    (1537, 256, 64), (7168, 64, 32), (7168, 64, 5), (7168, 64, 64), (7168, 64, 65), (1037, 512, 65),
    (4097, 65, 136), (777, 768, 65), (1280, 512, 49), (1280, 512, 16), (1280, 512, 32),
    (3000, 256, 32), (3000, 256, 16), (777, 1024, 20), (777, 1024, 8), (777, 1024, 48),
    (14100, 65, 20), (14208, 65, 49), (7168, 64, 129), (14100, 65, 72), (777, 1536, 72),
    (14100, 64, 129),
)  # fmt: skip
# The interpreter gets many tokens, few tokens, wide H, wide R, many slices of tokens, each once. No
# size divides evenly into tiles.
_SMALL_SIZES = (
    (37, 70, 20), (13, 75, 150), (0, 70, 20), (1, 70, 20), (290, 70, 20), (5, 530, 20),
    (530, 33, 9), (5, 3, 2),
)  # fmt: skip
_SMALL_TF32_SIZES = ((37, 70, 20), (13, 75, 150), (5, 530, 20))

# Options that suit any size, and take turns through the sizes of a GPU.
_EVERYWHERE: tuple[dict, ...] = (
    {},
    {"residual": "none"},
    {"residual": "tensor", "skip": True, "scaling": "channel"},
    {"skip": True, "scaling": 0.7},
    {"layout": "rows", "residual": "tensor", "skip": True, "grad_layout": "rows"},
    {"layout": "expanded"},
    {"layout": "spread", "grad_layout": "spread", "skip": True},
    {"layout": "unaligned", "grad_layout": "unaligned"},
    {"parameter_layout": "strided", "scaling": "channel"},
)
# Options that leave gradients out, or that fix the number of tokens.
_APART: tuple[dict, ...] = (
    {"shape": (0,)},
    {"shape": (1,)},
    {"bias": "none"},
    {"bias": "down"},
    {"bias": "up"},
    {"scaling": "learned", "shape": (3,)},
    {"scaling": "channel", "bias": "none"},
    {"needs": ("x",)},
    {"needs": ("down_weight", "up_weight", "down_bias", "up_bias")},
    {"needs": ("up_bias",), "residual": "none"},
    {"needs": ("scaling",), "scaling": "channel"},
    {"layout": "transposed", "shape": (5, 7), "skip": True, "grad_layout": "transposed"},
    # Two tokens: a long sum of one number rounds as its order says, in eager as anywhere else.
    {"grad_layout": "expanded", "shape": (2,)},
    {"grad_layout": "scalar", "shape": (2,)},
)
_MIXED: tuple[dict, ...] = (  # with a half-precision x
    {"residual": "tensor", "residual_dtype": torch.float32},
    {"parameter_dtype": torch.float32},
    {"parameter_dtype": torch.float32, "scaling": "channel"},
    {"parameter_dtype": torch.float32, "residual": "tensor", "residual_dtype": torch.float32},
)
# Inf and NaN: activations that keep a token finite whose z is Inf, at widths that are no tile's;
# and with few units to sum, gradients that are Inf rather than NaN. And relu, whose inactive units
# have gradient 0 whatever da is.
_NONFINITE: tuple[dict, ...] = (
    {"nonfinite": True, "activation": "tanh"},
    {"nonfinite": True, "activation": "sigmoid", "bottleneck_size": 3},
    {"nonfinite": True, "activation": "relu"},
)
# Norms behind the adapter that suit any size, and take turns through those below.
_NORMS: tuple[dict, ...] = (
    {"norm": "layer"},
    {"norm": "rms", "norm_affine": "weight"},
    {"norm": "layer", "prenorm": True, "skip": True, "scaling": "channel"},
    {"norm": "rms", "norm_affine": "weight", "weight_offset": 1.0, "residual": "tensor"},
    {"norm": "layer", "norm_affine": "weight", "eps": 0.5, "scaling": 0.7},
    {"norm": "rms", "norm_affine": "weight", "cast_before_weight": True, "prenorm": True},
    {"norm": "layer", "norm_affine": "none", "residual": "tensor", "skip": True, "layout": "rows",
     "grad_layout": "rows"},
    {"norm": "rms", "norm_affine": "none", "eps": 0.5, "prenorm": True, "residual": "none",
     "skip": True},
    {"norm": "layer", "cast_before_weight": True, "weight_offset": 1.0, "layout": "spread",
     "grad_layout": "spread"},
    {"norm": "rms", "layout": "unaligned", "grad_layout": "unaligned", "prenorm": True,
     "parameter_layout": "strided"},
)  # fmt: skip
# Frozen norms and adapters, a gradient that comes by way of the other output, few tokens, Inf and
# NaN, which a norm spreads over their token and no further.
_NORMS_APART: tuple[dict, ...] = (
    {"norm": "layer", "prenorm": True,
     "needs": ("x", "down_weight", "up_weight", "down_bias", "up_bias")},
    {"norm": "layer", "needs": ("norm_weight", "norm_bias")},
    {"norm": "rms", "needs": ("norm_weight",), "prenorm": True},
    {"norm": "layer", "needs": ("norm_bias",)},
    {"norm": "rms", "needs": ("skip",), "skip": True},
    {"norm": "rms", "bias": "none", "scaling": "channel", "norm_affine": "none"},
    {"norm": "layer", "shape": (0,), "prenorm": True},
    {"norm": "layer", "shape": (1,)},
    {"norm": "rms", "shape": (1,), "norm_affine": "weight", "prenorm": True},
    {"norm": "layer", "nonfinite": True, "activation": "tanh"},
    {"norm": "rms", "nonfinite": True, "activation": "tanh"},
)  # fmt: skip
_NORMS_MIXED: tuple[dict, ...] = (  # with a half-precision x
    {"norm": "layer", "parameter_dtype": torch.float32},
    {"norm": "rms", "norm_affine": "weight", "cast_before_weight": True, "residual": "tensor",
     "residual_dtype": torch.float32, "prenorm": True},
)  # fmt: skip
_SMALL_NORM_SIZES = ((17, 70, 20), (13, 75, 150), (37, 70, 20), (5, 530, 20), (5, 33, 17))
_LARGE_NORM_SIZES = (
    (5, 64, 16), (37, 1030, 49), (300, 776, 20), (777, 768, 65), (4097, 65, 20), (1280, 512, 32),
    (17, 2048, 64), (5, 4096, 129), (300, 4096, 64), (5, 8192, 64), (1037, 1024, 48),
    (14100, 64, 32),
)  # fmt: skip
# (T, H, R) on a GPU, in row blocks and with fewer tokens.
_APART_SIZE = (37, 1030, 49)
_FULL_SIZES = ((1037, 776, 49), (14100, 65, 24))
_NONFINITE_SIZES = ((14100, 65, 20), (2050, 520, 49), (37, 1030, 100))


def grid(
    dtypes: Iterable[torch.dtype],
    activations: Iterable[str],
    level: str = "default",
    small: bool = False,
    features: Collection[str] = (),
) -> list[Case]:
    """Return cases over dtypes, activations, sizes, and every option of the call.

    On a GPU the sizes of each arithmetic (float32, TF32, each half precision) reach every form of
    the kernels, and activations and options take turns through them; what leaves gradients out, and
    mixtures of dtypes, have cases of their own.

    Args:
        dtypes, activations: what a backend declares; with float32 comes TF32.
        level: quick (every activation in every dtype, once), default (also every size and every
            option, with norms) or full (every activation at every size, every option in every dtype
            and form).
        small: few and small sizes, for the CPU and Triton's interpreter.
        features: what a backend declares, for the cases with a norm behind the adapter.

    Raises:
        ValueError: an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}.")
    dtypes, activations = sorted(dtypes, key=name_of), sorted(activations)
    if not dtypes or not activations:
        return []
    cases = (_small if small else _large)(dtypes, activations, level)
    if level != "quick":
        norms = _norms(dtypes, activations, level, small)
        cases += [case for case in norms if f"{case.norm}_norm" in features]
    return list(dict.fromkeys(cases))


def _small(dtypes: list[torch.dtype], activations: list[str], level: str) -> list[Case]:
    sizes = list(map(_sized, _SMALL_SIZES))
    one = "gelu" if "gelu" in activations else activations[0]
    cases = _product(sizes[:1], dtypes, activations)
    if level == "quick":
        return cases
    cases += _product(sizes, dtypes, activations if level == "full" else [one])
    if torch.float32 in dtypes:
        tf32 = Case(activation=one, tf32=True)
        cases += [_sized(size, tf32) for size in _SMALL_TF32_SIZES]
    cases += options(replace(sizes[0], activation=one), dtypes, every_dtype=level == "full")
    if level == "full":
        cases += options(replace(sizes[1], activation=one), dtypes)
    return cases


def _large(dtypes: list[torch.dtype], activations: list[str], level: str) -> list[Case]:
    arithmetics = [Case(dtype) for dtype in dtypes]
    if torch.float32 in dtypes:
        arithmetics.append(Case(torch.float32, tf32=True))
    cases = []
    for offset, arithmetic in enumerate(arithmetics):
        turns = _turns(arithmetic, activations, offset)
        cases += turns[: len(activations)] if level == "quick" else turns
        if level == "full":
            cases += [replace(case, activation=name) for case in turns for name in activations]
    if level == "quick":
        return cases
    base = _sized(_APART_SIZE, Case(activation=activations[0]))
    cases += [*_alternating(base, dtypes, _APART, every_dtype=False), *_mixed(base, dtypes)]
    for index, (arithmetic, size) in enumerate(itertools.product(arithmetics, _NONFINITE_SIZES)):
        option = _NONFINITE[(index + index // len(_NONFINITE_SIZES)) % len(_NONFINITE)]
        cases.append(replace(_sized(size, arithmetic), **option))
    if level == "full":
        for size in _FULL_SIZES:
            cases += options(_sized(size, base), dtypes)
    return cases


def _norms(
    dtypes: list[torch.dtype], activations: list[str], level: str, small: bool
) -> list[Case]:
    """Return cases with a norm: activations, sizes and dtypes take turns through the norms."""
    one = "gelu" if "gelu" in activations else activations[0]
    sizes = _SMALL_NORM_SIZES if small else _LARGE_NORM_SIZES
    base = _sized(sizes[0] if small else _APART_SIZE, Case(activation=one))
    count = math.lcm(len(sizes), len(_NORMS)) if level == "full" else max(len(sizes), len(_NORMS))
    turns = [
        replace(
            _sized(sizes[index % len(sizes)], base),
            dtype=dtypes[(index + index // len(sizes)) % len(dtypes)],
            activation=activations[index % len(activations)],
            **_NORMS[index % len(_NORMS)],
        )
        for index in range(count)
    ]
    cases = turns + _alternating(base, dtypes, _NORMS_APART, every_dtype=level == "full")
    if torch.float32 in dtypes:
        # Squares of a sum around 1000 have no digit of its variance.
        shifted = replace(base, dtype=torch.float32, skip=True, shift=1000.0, norm="layer")
        cases += [shifted, replace(shifted, shift=0.0, tf32=True, prenorm=True)]
    for half in (dtype for dtype in dtypes if dtype.itemsize == 2):
        mixed = [replace(base, dtype=half, **option) for option in _NORMS_MIXED]
        in_float32 = replace(base, norm="layer", prenorm=True, autocast=half)
        cases += [*mixed, in_float32]
    return cases


def _turns(arithmetic: Case, activations: list[str], offset: int) -> list[Case]:
    """Return every size of this arithmetic once; activations and options take turns, beginning
    with different ones for each arithmetic."""
    sizes = _HALF_SIZES if arithmetic.dtype.itemsize == 2 else _FLOAT32_SIZES
    return [
        replace(
            _sized(size, arithmetic),
            activation=activations[index % len(activations)],
            **_EVERYWHERE[index % len(_EVERYWHERE)],
        )
        for index, size in enumerate(_TF32_SIZES if arithmetic.tf32 else sizes, start=3 * offset)
    ]


def _sized(size: tuple[int, int, int], case: Case | None = None) -> Case:
    tokens, hidden, bottleneck = size
    return replace(case or Case(), shape=(tokens,), hidden_size=hidden, bottleneck_size=bottleneck)


def _product(sizes: list[Case], dtypes: list[torch.dtype], activations: list[str]) -> list[Case]:
    combinations = itertools.product(sizes, dtypes, activations)
    return [replace(size, dtype=dtype, activation=name) for size, dtype, name in combinations]


def options(base: Case, dtypes: Iterable[torch.dtype], every_dtype: bool = True) -> list[Case]:
    """Return `base` with one option of the call after another, among them TF32, float32 masters,
    autocast, and Inf and NaN.

    Without `every_dtype` the options take turns through the dtypes.
    """
    dtypes = sorted(dtypes, key=name_of)
    everything = _EVERYWHERE + _APART + _NONFINITE
    cases = _alternating(base, dtypes, everything, every_dtype)
    if torch.float32 in dtypes:
        cases.append(replace(base, dtype=torch.float32, tf32=True, scaling="channel", skip=True))
    return cases + _mixed(base, dtypes)


def _alternating(
    base: Case, dtypes: list[torch.dtype], choices: tuple[dict, ...], every_dtype: bool
) -> list[Case]:
    return [
        replace(base, dtype=dtype, **option)
        for index, option in enumerate(choices)
        for dtype in (dtypes if every_dtype else [dtypes[index % len(dtypes)]])
    ]


def _mixed(base: Case, dtypes: list[torch.dtype]) -> list[Case]:
    """Return cases of half-precision products beside float32 tensors."""
    cases = []
    for half in (dtype for dtype in dtypes if dtype.itemsize == 2):
        mixed = [replace(base, dtype=half, **option) for option in _MIXED]
        # Autocast gets all of it in float32, and half-precision x beside a float32 residual stream.
        cases += [*mixed, replace(base, autocast=half), replace(mixed[-1], autocast=half)]
    return cases
