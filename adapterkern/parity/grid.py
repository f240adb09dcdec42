"""The grids of cases: for a GPU sizes that reach every kernel form, for a CPU a few small ones."""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch

from adapterkern.parity.cases import Case
from adapterkern.validation import name_of

LEVELS = ("quick", "default", "full")

# Sizes (T, H, R) that make the planners of both backends choose every form, tile and way of
# summing that they know, on GPUs of 108 to 148 SMs; tests/test_parity_forms.py holds that. Row
# blocks that fill 148 SMs take 14,081 tokens, so many tokens go with few features. Some sizes
# divide evenly into tiles, some do not. They are in the order of work: `quick` runs the first.
_FLOAT32_SIZES = (
    (13, 65, 8), (13, 65, 20), (5, 192, 5), (5, 256, 65), (300, 128, 136),
    (300, 776, 16), (2048, 128, 16), (4096, 65, 192), (1024, 300, 48), (8192, 65, 16),
    (8193, 65, 49), (7168, 128, 80), (7168, 128, 32), (8192, 136, 49),
)  # fmt: skip
_TF32_SIZES = (
    (5, 65, 100), (64, 65, 8), (5, 65, 136), (5, 65, 8), (5, 65, 48), (5, 256, 16), (5, 129, 100),
    (5, 300, 49), (37, 65, 72), (13, 384, 300), (520, 256, 65), (128, 1536, 32),
    (1537, 129, 16), (1537, 136, 65), (7168, 65, 72), (9000, 65, 49), (14100, 65, 64),
    (8193, 128, 16), (4097, 256, 136), (14100, 128, 20),
)  # fmt: skip
_HALF_SIZES = (
    (17, 64, 5), (17, 65, 100), (17, 256, 5), (17, 300, 100),
    (5, 128, 5), (5, 192, 20), (5, 65, 100), (37, 192, 5), (37, 300, 5), (37, 128, 24),
    (5, 1024, 16), (37, 128, 65), (5, 1030, 65), (16, 512, 48),
    (37, 300, 32), (13, 1030, 20), (37, 256, 80), (64, 256, 49), (37, 1030, 48), (777, 65, 49),
    (100, 520, 5), (128, 512, 24), (300, 768, 72), (4097, 65, 136),
    (2048, 136, 16), (1280, 512, 49), (1280, 520, 5), (10400, 65, 16), (3000, 256, 32),
    (3000, 256, 48), (3000, 256, 72), (1536, 512, 20), (3000, 264, 16), (777, 1024, 20),
    (777, 1024, 8), (777, 1024, 48), (14208, 65, 49), (1537, 768, 72), (777, 1536, 72),
    (10400, 65, 128), (10400, 128, 136), (14100, 128, 20), (14100, 128, 128),
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
# and with few units to sum, gradients that are Inf rather than NaN. Not relu: where dy is Inf,
# autograd puts 0 at an inactive unit, and every backend here, the reference too, 0 times Inf: NaN.
_NONFINITE: tuple[dict, ...] = (
    {"nonfinite": True, "activation": "tanh"},
    {"nonfinite": True, "activation": "sigmoid", "bottleneck_size": 3},
)
# (T, H, R) on a GPU, in row blocks and with fewer tokens.
_APART_SIZE = (37, 1030, 49)
_FULL_SIZES = ((1037, 776, 49), (14100, 65, 24))
_NONFINITE_SIZES = ((14100, 65, 20), (2050, 520, 49), (37, 1030, 100))


def grid(
    dtypes: Iterable[torch.dtype],
    activations: Iterable[str],
    level: str = "default",
    small: bool = False,
) -> list[Case]:
    """Return cases over dtypes, activations, sizes, and every option of the call.

    On a GPU the sizes of each arithmetic (float32, TF32, each half precision) reach every form of
    the kernels, and activations and options take turns through them; what leaves gradients out, and
    mixtures of dtypes, have cases of their own.

    Args:
        dtypes, activations: what a backend declares; with float32 comes TF32.
        level: quick (every activation in every dtype, once), default (also every size and every
            option) or full (every activation at every size, every option in every dtype and form).
        small: few and small sizes, for the CPU and Triton's interpreter.

    Raises:
        ValueError: an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}.")
    dtypes, activations = sorted(dtypes, key=name_of), sorted(activations)
    if not dtypes or not activations:
        return []
    cases = (_small if small else _large)(dtypes, activations, level)
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
    for index, (arithmetic, size) in enumerate(itertools.product(arithmetics, _NONFINITE_SIZES), 1):
        option = _NONFINITE[index % len(_NONFINITE)]
        cases.append(replace(_sized(size, arithmetic), **option))
    if level == "full":
        for size in _FULL_SIZES:
            cases += options(_sized(size, base), dtypes)
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
