"""The calls of many adapters that are compared: `GroupedCase`, and `cases` of them.

Units beyond a slot's rank hold NaN, and the routing is made for more tokens than x has.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkern.grouped import reference
from adapterkern.grouped.call import GroupedCall, make_grouped_call
from adapterkern.grouped.functional import grouped_bottleneck_adapter
from adapterkern.grouped.routing import AdapterRouting
from adapterkern.parity.cases import FEWEST_ELEMENTS, SHORT_NAMES, matmul_precision, place
from adapterkern.results import Outputs
from adapterkern.validation import name_of

_SPARE_TOKENS = 29  # of a routing, beyond those of x

# (T, H, R, S): few tokens, which go by row, and many with many units, which go in tiles; slots with
# no token, with a tile that is part full, with several. Little divides evenly. Every dtype gets the
# first two.
_SMALL_SIZES = (
    (9, 70, 20, 8), (70, 33, 64, 3), (1, 70, 20, 4), (13, 75, 70, 2), (0, 70, 20, 2),
    (130, 40, 40, 4), (16, 64, 16, 16), (66, 70, 65, 2),
)  # fmt: skip
_LARGE_SIZES = (
    (16, 768, 64, 16), (2048, 768, 64, 16), (1, 1024, 48, 4), (777, 1030, 49, 5),
    (64, 512, 16, 64), (4097, 520, 20, 9), (33, 4096, 8, 7), (1000, 65, 136, 3),
    (3000, 256, 32, 64), (130, 2048, 64, 2), (0, 64, 16, 2), (14100, 64, 16, 4),
)  # fmt: skip
# Options that suit any size and take turns through them.
_OPTIONS: tuple[dict, ...] = (
    {},
    {"ranks": False, "bias": False, "residual": "none"},
    {"residual": "tensor", "skip": True, "scaling": "fixed", "layout": "rows"},
    {"scaling": "fixed", "mix": "one", "grad_layout": "rows"},
    {"skip": True, "mix": "distinct", "needs": ("x",)},
    {
        "layout": "unaligned",
        "grad_layout": "unaligned",
        "parameter_layout": "strided",
        "scaling": "learned",
        "mix": "distinct",
    },
    {"mix": "none", "skip": True, "scaling": "fixed"},
    {"needs": ("down_weights", "up_weights", "down_biases", "up_biases"), "mix": "distinct"},
    {"scaling": "learned", "needs": ("scalings",), "ranks": False},
)


@dataclass(frozen=True)
class GroupedCase:
    """One call of many adapters to compare, with the interface of `parity.Case`. `str(case)` is its
    id, for example grouped-bf16-gelu-T37-H768-R48-S4.
    """

    operands: ClassVar[tuple[str, ...]] = (
        "x", "down_weights", "up_weights", "down_biases", "up_biases",
    )  # fmt: skip
    nonfinite: ClassVar[bool] = False

    dtype: torch.dtype = torch.float32  # of x
    activation: str = "gelu"
    num_tokens: int = 37
    hidden_size: int = 70
    bottleneck_size: int = 20
    slots: int = 3
    mix: str = "mixed"  # tokens of all slots and of none; one slot; distinct: in turns; none
    ranks: bool = True  # whether slots have fewer units than R, and the last one has none
    bias: bool = True
    residual: str = "input"  # input | tensor | none
    skip: bool = False
    scaling: str = "none"  # none | fixed | learned
    parameter_dtype: torch.dtype | None = None  # None: x's
    layout: str = "contiguous"  # of x, residual and skip, one of LAYOUTS
    grad_layout: str = "contiguous"
    parameter_layout: str = "contiguous"  # or strided: the slots are not one behind the other
    needs: tuple[str, ...] | None = None  # names of `GroupedCall`; None: every gradient there is
    tf32: bool = False

    def __str__(self) -> str:
        sizes = f"T{self.num_tokens}-H{self.hidden_size}-R{self.bottleneck_size}-S{self.slots}"
        options = {
            self.mix: self.mix != "mixed",
            "full_ranks": not self.ranks,
            "bias_none": not self.bias,
            f"residual_{self.residual}": self.residual != "input",
            "skip": self.skip,
            f"scaling_{self.scaling}": self.scaling != "none",
            f"parameters_{SHORT_NAMES.get(self.parameter_dtype or self.dtype)}": (
                self.parameter_dtype is not None
            ),
            f"x_{self.layout}": self.layout != "contiguous",
            f"grad_{self.grad_layout}": self.grad_layout != "contiguous",
            f"parameters_{self.parameter_layout}": self.parameter_layout != "contiguous",
            f"needs_{'+'.join(self.needs or ('nothing',))}": self.needs is not None,
        }
        present = [option for option, is_present in options.items() if is_present]
        return "-".join(["grouped", self.dtype_class, self.activation, sizes, *present])

    @property
    def dtype_class(self) -> str:
        """The arithmetic of the products: fp32, tf32, fp16, bf16 or fp64."""
        return "tf32" if self.tf32 else SHORT_NAMES[self.dtype]

    @property
    def draws(self) -> int:
        """How many draws of data the case is judged over."""
        elements = max(self.num_tokens, 1) * self.hidden_size
        if self.scaling == "learned":
            elements = min(elements, len(set(self.ids().tolist()) - {-1}) or elements)
        return math.ceil(FEWEST_ELEMENTS / elements)

    def ids(self) -> Tensor:
        """The slot of each token [T]."""
        if self.mix == "none":
            return torch.full((self.num_tokens,), -1)
        if self.mix == "one":
            return torch.zeros(self.num_tokens, dtype=torch.int64)
        if self.mix == "distinct":
            return torch.arange(self.num_tokens) % self.slots
        generator = torch.Generator().manual_seed(self.num_tokens)
        return torch.randint(-1, self.slots, (self.num_tokens,), generator=generator)

    def rank_of_slots(self) -> list[int]:
        """The units of each slot: R of the first, fewer of others, none of the last."""
        size = self.bottleneck_size
        ranks = [max(1, size - size * slot // self.slots) for slot in range(self.slots)]
        return [*ranks[:-1], 0 if self.slots > 1 else size] if self.ranks else [size] * self.slots

    def wanted(self, tensors: dict[str, Tensor]) -> list[str]:
        """Return the names of the tensors whose gradient this case asks for."""
        frozen = ("scalings",) if self.scaling == "fixed" else ()
        asked = tensors if self.needs is None else self.needs
        return [name for name in tensors if name in asked and name not in frozen]

    def precision(self, device: torch.device) -> Any:
        """Apply the settings under which a user would make the call."""
        return self.matmul_precision()

    def matmul_precision(self) -> Any:
        """As `Case.matmul_precision`."""
        return matmul_precision(self.dtype, self.tf32)

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `grouped_bottleneck_adapter`, all but the backend."""
        device = tensors["x"].device
        routing = AdapterRouting(self.num_tokens + _SPARE_TOKENS, self.slots, device=device)
        defaults: dict[str, Any] = {"residual": "input" if self.residual == "input" else None}
        if self.ranks:
            defaults["ranks"] = torch.tensor(self.rank_of_slots(), dtype=torch.int32).to(device)
        options = {"activation": self.activation, "routing": routing.update(self.ids())}
        return {**defaults, **options, **tensors}

    def call(self, arguments: dict[str, Any], backend: str) -> Outputs:
        """Make the call as a user would, and return what it returns."""
        return Outputs(grouped_bottleneck_adapter(**arguments, backend=backend))

    def make_call(self, tensors: dict[str, Tensor]) -> GroupedCall:
        """Return the call that `grouped_bottleneck_adapter` makes of these tensors."""
        given = dict.fromkeys(("down_biases", "up_biases", "skip", "scalings", "ranks"))
        arguments: dict[str, Any] = {**given, **self.arguments(tensors)}
        arguments["routing"] = arguments["routing"].buffers()
        return make_grouped_call(**arguments, gradient=False)

    def plain(self, call: GroupedCall) -> Outputs:
        """The outputs in plain operations, which autograd differentiates."""
        return Outputs(reference.plain(call))

    def draw(self, device: torch.device | str, seed: int) -> dict[str, Tensor]:
        """Draw the inputs, named as in `GroupedCall`; z, u and the residual are of order 1."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same values everywhere
        hidden, units, slots = self.hidden_size, self.bottleneck_size, self.slots
        wide, of_parameters = (self.num_tokens, hidden), self.parameter_dtype or self.dtype
        exists = torch.tensor(self.rank_of_slots())[:, None] > torch.arange(units)  # [S, R]

        def normal(shape, scale, dtype, layout, gap=8, mean=0.0, mask=None) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean
            if mask is not None:
                values = torch.where(mask, values, math.nan)
            return place(values.to(dtype).to(device), layout, gap)

        rows = of_parameters, "rows" if self.parameter_layout == "strided" else "contiguous"
        any_exists = exists.any(1)[:, None]
        tensors = {
            "x": normal(wide, 1.0, self.dtype, self.layout),
            "down_weights": normal(
                (slots, units, hidden), hidden**-0.5, *rows, mask=exists[:, :, None]
            ),
            "up_weights": normal(
                (slots, hidden, units), 2 * units**-0.5, *rows, mask=exists[:, None, :]
            ),
        }
        if self.bias:
            tensors["down_biases"] = normal((slots, units), 0.5, *rows, mask=exists)
            tensors["up_biases"] = normal((slots, hidden), 0.5, *rows, mask=any_exists)
        if self.residual == "tensor":
            tensors["residual"] = normal(wide, 1.0, self.dtype, self.layout, gap=16)
        if self.skip:
            tensors["skip"] = normal(wide, 1.0, self.dtype, self.layout, gap=24)
        if self.scaling != "none":
            of_scalings = torch.promote_types(self.dtype, torch.float32)
            tensors["scalings"] = normal((slots,), 0.5, of_scalings, "contiguous", mean=1.0)
        return tensors

    def draw_upstream(self, call: GroupedCall, seed: int) -> Outputs:
        """Draw the gradient of y."""
        generator = torch.Generator().manual_seed(2**20 + seed)
        values = torch.randn(call.x.shape, generator=generator, dtype=torch.float64)
        placed = place(values.to(call.output_dtype).to(call.x.device), self.grad_layout)
        return Outputs(placed)


def cases(
    dtypes: Iterable[torch.dtype],
    activations: Iterable[str],
    level: str = "default",
    small: bool = False,
    features: Collection[str] = (),
) -> list[GroupedCase]:
    """Return cases of many adapters for what a backend declares, with the arguments of
    `parity.grid`: sizes in turn with dtypes, activations and options; under "full" in every dtype
    with two options; under "quick" none. A backend without "gradient" is asked for no gradient.
    """
    dtypes, activations = sorted(dtypes, key=name_of), sorted(activations)
    if level == "quick" or not dtypes or not activations:
        return []
    sizes = _SMALL_SIZES if small else _LARGE_SIZES
    rounds = 2 * len(dtypes) if level == "full" else 1
    found = []
    for index in range(max(len(sizes), len(_OPTIONS)) * rounds):
        again = index // len(sizes)  # so that no size keeps meeting the same dtype and option
        case = GroupedCase(
            dtypes[(index + again) % len(dtypes)], activations[index % len(activations)]
        )
        option = _OPTIONS[(index + again) % len(_OPTIONS)]
        found.append(replace(_sized(sizes[index % len(sizes)], case), **option))
    one = GroupedCase(activation="gelu" if "gelu" in activations else activations[0])
    few, many = (_sized(size, one) for size in sizes[:2])
    for dtype in dtypes:
        found += [replace(case, dtype=dtype, scaling="fixed", skip=True) for case in (few, many)]
        if dtype.itemsize == 2:
            found.append(replace(few, dtype=dtype, parameter_dtype=torch.float32))
        if dtype == torch.float32:
            found += [replace(case, tf32=True) for case in (few, many)]
    return list(dict.fromkeys(_declared(case, features) for case in found))


def _sized(size: tuple[int, int, int, int], case: GroupedCase) -> GroupedCase:
    tokens, hidden, units, slots = size
    return replace(case, num_tokens=tokens, hidden_size=hidden, bottleneck_size=units, slots=slots)


def _declared(case: GroupedCase, features: Collection[str]) -> GroupedCase:
    """The case without what a backend does not have."""
    if "ranks" not in features:
        case = replace(case, ranks=False)
    if "gradient" not in features:
        return replace(case, needs=())
    if case.scaling == "learned" and "learned_scaling" not in features:
        return replace(case, scaling="fixed", needs=None)
    return case
