"""What is compared: one `Case` a call, its inputs, and the grids of cases.

Every input lies in a larger buffer of NaN, so a read beyond its end shows in the result.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapterkern.functional import make_call
from adapterkern.spec import AdapterCall, name_of

SHORT_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
LAYOUTS = ("contiguous", "rows", "transposed", "expanded", "scalar", "spread", "unaligned")
LEVELS = ("quick", "default", "full")

_PADDING = 128  # elements of NaN around each input; a multiple of what an allocation is aligned to
# A tensor with fewer elements than this is judged over several draws of data, so that neither a sum
# that happens to cancel nor an eager result that happens to be exact decides.
_FEWEST_ELEMENTS = 16


@dataclass(frozen=True)
class Case:
    """One call to compare. `str(case)` is its id, for example bf16-gelu-T37-H768-R48."""

    dtype: torch.dtype = torch.float32  # of x
    activation: str = "gelu"
    shape: tuple[int, ...] = (37,)  # the leading shape of x
    hidden_size: int = 70
    bottleneck_size: int = 20
    bias: str = "both"  # both | down | up | none
    residual: str = "input"  # input | tensor | none
    residual_dtype: torch.dtype | None = None  # None: x's
    skip: bool = False
    scaling: float | str = 1.0  # a float | learned | channel
    parameter_dtype: torch.dtype | None = None  # None: x's
    autocast: torch.dtype | None = None
    layout: str = "contiguous"  # of x, residual and skip, one of LAYOUTS
    grad_layout: str = "contiguous"  # of the gradient of y, one of LAYOUTS
    parameter_layout: str = "contiguous"  # or strided: weights transposed, vectors spread
    needs: tuple[str, ...] | None = None  # names of `AdapterCall`; None: every gradient there is

    def __str__(self) -> str:
        tokens = "x".join(map(str, self.shape))
        sizes = f"T{tokens}-H{self.hidden_size}-R{self.bottleneck_size}"
        residual = self.residual
        if self.residual_dtype is not None:
            residual += f"_{_short(self.residual_dtype)}"
        options = {
            f"bias_{self.bias}": self.bias != "both",
            f"residual_{residual}": residual != "input",
            "skip": self.skip,
            f"scaling_{self.scaling}": self.scaling != 1.0,
            f"parameters_{_short(self.parameter_dtype)}": self.parameter_dtype is not None,
            f"autocast_{_short(self.autocast)}": self.autocast is not None,
            f"x_{self.layout}": self.layout != "contiguous",
            f"grad_{self.grad_layout}": self.grad_layout != "contiguous",
            f"parameters_{self.parameter_layout}": self.parameter_layout != "contiguous",
            f"needs_{'+'.join(self.needs or ('nothing',))}": self.needs is not None,
        }
        present = [option for option, is_present in options.items() if is_present]
        return "-".join([_short(self.dtype), self.activation, sizes, *present])

    @property
    def draws(self) -> int:
        """How many draws of data the case is judged over."""
        num_tokens = math.prod(self.shape)
        sizes = [num_tokens * self.hidden_size, self.hidden_size, self.bottleneck_size]
        sizes += [1] if self.scaling == "learned" else []
        return math.ceil(_FEWEST_ELEMENTS / min(size for size in sizes if size > 0))

    def wanted(self, tensors: dict[str, Tensor]) -> list[str]:
        """Of the tensors, those whose gradient this case asks for."""
        return [name for name in tensors if self.needs is None or name in self.needs]

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The autocast of this case, where it has one."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of `bottleneck_adapter`, all but the backend."""
        defaults: dict[str, Any] = dict.fromkeys(("down_bias", "up_bias", "residual", "skip"))
        if self.residual == "input":
            defaults["residual"] = "input"
        options = {"activation": self.activation, "scaling": self.scaling}
        return {**defaults, **options, **tensors}

    def make_call(self, tensors: dict[str, Tensor]) -> AdapterCall:
        """The call that `bottleneck_adapter` makes of these tensors."""
        with self.precision(tensors["x"].device):
            return make_call(**self.arguments(tensors), dropout=0.0)

    def draw(self, device: torch.device | str, seed: int) -> dict[str, Tensor]:
        """The input tensors, named as in `AdapterCall`; z, u and the residual are of order 1."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same values everywhere
        hidden, bottleneck = self.hidden_size, self.bottleneck_size
        parameter_dtype = self.parameter_dtype or self.dtype

        strided = self.parameter_layout == "strided"

        def normal(shape, scale, dtype, layout, mean=0.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean
            return place(values.to(dtype).to(device), layout)

        wide = (*self.shape, hidden)
        weights = parameter_dtype, "transposed" if strided else "contiguous"
        vectors = parameter_dtype, "spread" if strided else "contiguous"
        tensors = {
            "x": normal(wide, 1.0, self.dtype, self.layout),
            "down_weight": normal((bottleneck, hidden), hidden**-0.5, *weights),
            "up_weight": normal((hidden, bottleneck), 2 * bottleneck**-0.5, *weights),
        }
        if self.bias in ("both", "down"):
            tensors["down_bias"] = normal((bottleneck,), 0.5, *vectors)
        if self.bias in ("both", "up"):
            tensors["up_bias"] = normal((hidden,), 0.5, *vectors)
        if self.residual == "tensor":
            tensors["residual"] = normal(wide, 1.0, self.residual_dtype or self.dtype, self.layout)
        if self.skip:
            tensors["skip"] = normal(wide, 1.0, self.dtype, self.layout)
        if isinstance(self.scaling, str):
            size = 1 if self.scaling == "learned" else hidden
            tensors["scaling"] = normal((size,), 0.5, *vectors, mean=1.0)
        return tensors

    def draw_grad_output(self, call: AdapterCall, seed: int) -> Tensor:
        """A gradient of y, [..., H] in the dtype of y."""
        generator = torch.Generator().manual_seed(2**20 + seed)
        values = torch.randn(call.x.shape, generator=generator, dtype=torch.float64)
        return place(values.to(call.output_dtype).to(call.x.device), self.grad_layout)


def _short(dtype: torch.dtype | None) -> str:
    return "same" if dtype is None else SHORT_NAMES[dtype]


def place(values: Tensor, layout: str) -> Tensor:
    """`values` in a larger buffer of NaN, in one of LAYOUTS.

    rows: a gap after each row; transposed: the first two dimensions the other way round in memory;
    expanded: stride 0 in the first dimension, whose first entry is repeated; scalar: stride 0 in
    all, as the gradient of a sum has it; spread: every second element; unaligned: one element
    behind an aligned address.
    """
    shape = list(values.shape)
    order = list(range(len(shape)))  # of the dimensions in memory, the slowest first
    if layout == "transposed":
        order[:2] = order[1::-1]
    strides = [0] * len(shape)
    extent = 2 if layout == "spread" else 1
    for axis in reversed(order):
        strides[axis] = extent
        extent *= max(shape[axis], 1)
        if layout == "rows" and axis == order[-1]:
            extent += 8
    buffer = values.new_full((extent + 2 * _PADDING,), math.nan)
    view = buffer.as_strided(shape, strides, _PADDING + (layout == "unaligned"))
    view.copy_(values)
    if layout == "expanded":
        return view[:1].expand(shape)
    return view[(0,) * len(shape)].expand(shape) if layout == "scalar" else view


# (T, H, R): the base size first, then one whose bottleneck is too wide for one program. No size
# divides evenly into tiles.
_SIZES = (
    (1037, 776, 49), (37, 1030, 517), (0, 768, 48), (1, 768, 48), (4097, 768, 48), (129, 384, 192),
    (300, 4096, 64), (2050, 129, 8), (61, 3, 5), (7, 1, 1),
)  # fmt: skip
# For the interpreter: many tokens, few tokens, wide H, wide R, many slices of tokens, each once.
_SMALL_SIZES = (
    (37, 70, 20), (9, 75, 150), (0, 70, 20), (1, 70, 20), (290, 70, 20), (5, 530, 20),
    (530, 33, 9), (5, 3, 2),
)  # fmt: skip
_OPTIONS: tuple[dict, ...] = (
    {"bias": "none"},
    {"bias": "down"},
    {"bias": "up"},
    {"residual": "none"},
    {"residual": "tensor", "residual_dtype": torch.float32},
    {"residual": "tensor", "skip": True, "scaling": "channel"},
    {"skip": True, "scaling": 0.7},
    {"scaling": "learned", "shape": (3,)},
    {"scaling": "channel", "bias": "none"},
    {"needs": ("x",)},
    {"needs": ("down_weight", "up_weight", "down_bias", "up_bias")},
    {"needs": ("up_bias",), "residual": "none"},
    {"needs": ("scaling",), "scaling": "channel"},
    {"layout": "rows", "residual": "tensor", "grad_layout": "rows"},
    {"layout": "transposed", "shape": (5, 7), "skip": True, "grad_layout": "transposed"},
    {"layout": "expanded"},
    # Two tokens: a long sum of one number rounds as its order says, in eager as anywhere else.
    {"grad_layout": "expanded", "shape": (2,)},
    {"grad_layout": "scalar", "shape": (2,)},
    {"layout": "spread", "grad_layout": "spread", "skip": True},
    {"layout": "unaligned", "grad_layout": "unaligned"},
    {"parameter_layout": "strided", "scaling": "channel"},
)
_MIXED_OPTIONS: tuple[dict, ...] = (  # with a half-precision x
    {"parameter_dtype": torch.float32},
    {"parameter_dtype": torch.float32, "scaling": "channel"},
    {"parameter_dtype": torch.float32, "residual": "tensor", "residual_dtype": torch.float32},
)


def grid(
    dtypes: Iterable[torch.dtype],
    activations: Iterable[str],
    level: str = "default",
    small: bool = False,
) -> list[Case]:
    """Cases over dtypes, activations, sizes that divide nothing, and every option of the call.

    Args:
        dtypes, activations: what a backend declares.
        level: quick (every activation at one size), default (also every size and every option, with
            gelu) or full (every activation at every size, every option in every dtype and form).
        small: sizes for the CPU and Triton's interpreter instead of a GPU.

    Raises:
        ValueError: an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}.")
    dtypes, activations = sorted(dtypes, key=name_of), sorted(activations)
    if not dtypes or not activations:
        return []
    sizes = [
        Case(shape=(tokens,), hidden_size=hidden, bottleneck_size=bottleneck)
        for tokens, hidden, bottleneck in (_SMALL_SIZES if small else _SIZES)
    ]
    one = "gelu" if "gelu" in activations else activations[0]
    cases = _product(sizes[:1], dtypes, activations)
    if level != "quick":
        cases += _product(sizes, dtypes, activations if level == "full" else [one])
        cases += options(replace(sizes[0], activation=one), dtypes, every_dtype=level == "full")
    if level == "full":
        cases += options(replace(sizes[1], activation=one), dtypes)
    return list(dict.fromkeys(cases))


def _product(sizes: list[Case], dtypes: list[torch.dtype], activations: list[str]) -> list[Case]:
    combinations = itertools.product(sizes, dtypes, activations)
    return [replace(size, dtype=dtype, activation=name) for size, dtype, name in combinations]


def options(base: Case, dtypes: Iterable[torch.dtype], every_dtype: bool = True) -> list[Case]:
    """`base` with one option of the call after another, float32 masters and autocast among them.

    Without `every_dtype` the options take turns through the dtypes.
    """
    dtypes = sorted(dtypes, key=name_of)
    cases = []
    for index, option in enumerate(_OPTIONS):
        for dtype in dtypes if every_dtype else [dtypes[index % len(dtypes)]]:
            if dtype != torch.float64 or "residual_dtype" not in option:  # float64 does not mix
                cases.append(replace(base, dtype=dtype, **option))
    for half in (dtype for dtype in dtypes if dtype.itemsize == 2):
        mixed = [replace(base, dtype=half, **option) for option in _MIXED_OPTIONS]
        # Under autocast: all of it float32, and half-precision x beside a float32 residual stream.
        cases += [*mixed, replace(base, autocast=half), replace(mixed[-1], autocast=half)]
    return cases
