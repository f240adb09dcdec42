"""The calls that are compared, one `Case` each, and their inputs.

Every input lies in a larger buffer of NaN, so a read beyond its end shows in the result.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkern import reference
from adapterkern.functional import bottleneck_adapter, bottleneck_adapter_norm
from adapterkern.results import Outputs
from adapterkern.spec import AdapterCall, make_call, with_norm

SHORT_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
LAYOUTS = ("contiguous", "rows", "transposed", "expanded", "scalar", "spread", "unaligned")

_PADDING = 128  # elements of NaN around each input; a multiple of what an allocation is aligned to
# A tensor with fewer elements than this is judged over several draws of data, so that neither a sum
# that happens to cancel nor an eager result that happens to be exact decides.
FEWEST_ELEMENTS = 16
# In a case with nonfinite values, x and dy each hold these in these tokens. Those around them
# stay finite; none follows another, for eager on a CPU with AMX may spoil the token before one.
_NONFINITE = (math.inf, -math.inf, math.nan)
_NONFINITE_IN_X, _NONFINITE_IN_DY = (1, 3, 5), (7, 9, 11)


@dataclass(frozen=True)
class Case:
    """One call to compare. `str(case)` is its id, for example bf16-gelu-T37-H768-R48."""

    # The operands of the products.
    operands: ClassVar[tuple[str, ...]] = ("x", "down_weight", "up_weight", "down_bias", "up_bias")

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
    tf32: bool = False  # float32 products in TF32
    nonfinite: bool = False  # Inf, -Inf and NaN in a few tokens of x and others of dy
    shift: float = 0.0  # added to skip: a mean that is far from zero
    norm: str = "none"  # none | layer | rms; without one, the fields below have no meaning
    norm_affine: str = "both"  # both | weight | none
    eps: float = 1e-5
    weight_offset: float = 0.0
    cast_before_weight: bool = False
    prenorm: bool = False

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
            "nonfinite": self.nonfinite,
            f"skip_shifted_{self.shift:g}": self.shift != 0,
            f"{self.norm}_norm": self.norm != "none",
            f"affine_{self.norm_affine}": self.norm_affine != "both",
            f"eps_{self.eps:g}": self.eps != 1e-5,
            f"offset_{self.weight_offset:g}": self.weight_offset != 0,
            "cast": self.cast_before_weight,
            "prenorm": self.prenorm,
        }
        present = [option for option, is_present in options.items() if is_present]
        dtype = "tf32" if self.tf32 else _short(self.dtype)
        return "-".join([dtype, self.activation, sizes, *present])

    @property
    def dtype_class(self) -> str:
        """The arithmetic of the products: fp32, tf32, fp16, bf16 or fp64."""
        return "tf32" if self.tf32 else _short(self.autocast or self.dtype)

    @property
    def draws(self) -> int:
        """How many draws of data the case is judged over."""
        num_tokens = math.prod(self.shape)
        sizes = [num_tokens * self.hidden_size, self.hidden_size, self.bottleneck_size]
        sizes += [1] if self.scaling == "learned" else []
        return math.ceil(FEWEST_ELEMENTS / min(size for size in sizes if size > 0))

    def wanted(self, tensors: dict[str, Tensor]) -> list[str]:
        """Return the names of the tensors whose gradient this case asks for."""
        return [name for name in tensors if self.needs is None or name in self.needs]

    @contextlib.contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Apply the settings under which a user would make the call: `matmul_precision`, and
        autocast where the case has it."""
        autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.autocast is not None:
            autocast = torch.autocast(device.type, self.autocast)
        with self.matmul_precision(), autocast:
            yield

    def matmul_precision(self) -> contextlib.AbstractContextManager:
        """Set torch's float32 products to "high" (TF32) or "highest", whatever they were."""
        return matmul_precision(self.dtype, self.tf32)

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `bottleneck_adapter`, or with a norm of
        `bottleneck_adapter_norm`, all but the backend."""
        of_norm = self._norm_arguments(tensors)
        adapter = {name: tensor for name, tensor in tensors.items() if name not in of_norm}
        defaults: dict[str, Any] = dict.fromkeys(("down_bias", "up_bias", "residual", "skip"))
        if self.residual == "input":
            defaults["residual"] = "input"
        options = {"activation": self.activation, "scaling": self.scaling}
        return {**defaults, **options, **adapter, **of_norm}

    def call(self, arguments: dict[str, Any], backend: str) -> Outputs:
        """Make the call as a user would, and return what it returns."""
        if self.norm == "none":
            return Outputs(bottleneck_adapter(**arguments, backend=backend))
        returned = bottleneck_adapter_norm(**arguments, backend=backend)
        normed, y = returned if self.prenorm else (returned, None)
        return Outputs(y, normed)

    def plain(self, call: AdapterCall) -> Outputs:
        """The outputs in plain operations, which autograd differentiates."""
        outputs = reference.forward(call)[0]
        return outputs if self.norm == "none" or self.prenorm else outputs._replace(y=None)

    def _norm_arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if self.norm == "none":
            return {}
        parameters = {name: tensors.get(name) for name in ("norm_weight", "norm_bias")}
        options = ("norm", "eps", "weight_offset", "cast_before_weight", "prenorm")
        return {**parameters, **{name: getattr(self, name) for name in options}}

    def make_call(self, tensors: dict[str, Tensor]) -> AdapterCall:
        """Return the call that `bottleneck_adapter` or `bottleneck_adapter_norm` makes of these
        tensors."""
        of_norm = self._norm_arguments(tensors)
        arguments = self.arguments(tensors)
        with self.precision(tensors["x"].device):
            call = make_call(**{n: a for n, a in arguments.items() if n not in of_norm})
        return with_norm(call, **of_norm) if of_norm else call

    def draw(self, device: torch.device | str, seed: int) -> dict[str, Tensor]:
        """Draw the inputs, named as in `AdapterCall`; z, u and the residual are of order 1."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same values everywhere
        hidden, bottleneck = self.hidden_size, self.bottleneck_size
        parameter_dtype = self.parameter_dtype or self.dtype

        strided = self.parameter_layout == "strided"

        def normal(shape, scale, dtype, layout, mean=0.0, nonfinite_in=(), gap=8) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean
            self._plant(values, nonfinite_in)
            return place(values.to(dtype).to(device), layout, gap)

        wide = (*self.shape, hidden)
        weights = parameter_dtype, "transposed" if strided else "contiguous"
        vectors = parameter_dtype, "spread" if strided else "contiguous"
        tensors = {
            "x": normal(wide, 1.0, self.dtype, self.layout, nonfinite_in=_NONFINITE_IN_X),
            "down_weight": normal((bottleneck, hidden), hidden**-0.5, *weights),
            "up_weight": normal((hidden, bottleneck), 2 * bottleneck**-0.5, *weights),
        }
        if self.bias in ("both", "down"):
            tensors["down_bias"] = normal((bottleneck,), 0.5, *vectors)
        if self.bias in ("both", "up"):
            tensors["up_bias"] = normal((hidden,), 0.5, *vectors)
        if self.residual == "tensor":
            dtype = self.residual_dtype or self.dtype
            tensors["residual"] = normal(wide, 1.0, dtype, self.layout, gap=16)
        if self.skip:
            tensors["skip"] = normal(wide, 1.0, self.dtype, self.layout, self.shift, gap=24)
        if isinstance(self.scaling, str):
            size = 1 if self.scaling == "learned" else hidden
            tensors["scaling"] = normal((size,), 0.5, *vectors, mean=1.0)
        if self.norm != "none" and self.norm_affine != "none":
            mean = 1 - self.weight_offset
            tensors["norm_weight"] = normal((hidden,), 0.2, *vectors, mean=mean)
            if self.norm_affine == "both":
                tensors["norm_bias"] = normal((hidden,), 0.5, *vectors)
        return tensors

    def draw_grad_output(self, call: AdapterCall, seed: int) -> Tensor:
        """Draw a gradient of y, [..., H] in the dtype of y."""
        return self._draw_gradient(call.x, call.output_dtype, 2**20 + seed, _NONFINITE)

    def draw_upstream(self, call: AdapterCall, seed: int) -> Outputs:
        """Draw the gradient of each output that the call returns, as `Outputs` has them."""
        if self.norm == "none":
            return Outputs(self.draw_grad_output(call, seed))
        # NaN alone: an Inf meets Inf in the means over the token, and which of them becomes NaN
        # depends on the order of the sums.
        nan = (math.nan,) * len(_NONFINITE)
        normed = self._draw_gradient(call.x, call.normed_dtype, 2**21 + seed, nan)
        return Outputs(self.draw_grad_output(call, seed) if self.prenorm else None, normed)

    def _draw_gradient(
        self, x: Tensor, dtype: torch.dtype, seed: int, nonfinite: tuple[float, ...]
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        self._plant(values, _NONFINITE_IN_DY, nonfinite)
        return place(values.to(dtype).to(x.device), self.grad_layout)

    def _plant(
        self, values: Tensor, tokens: tuple[int, ...], planted: tuple[float, ...] = _NONFINITE
    ) -> None:
        """Plant these values, one element of a token each, where the case is nonfinite."""
        if not self.nonfinite or not tokens:
            return
        rows = values.view(-1, self.hidden_size)
        if rows.shape[0] <= max(_NONFINITE_IN_DY) + 1:
            raise ValueError(
                f"a nonfinite case needs at least {max(_NONFINITE_IN_DY) + 2} tokens, so that some "
                f"stay finite; got {rows.shape[0]}."
            )
        for token, value in zip(tokens, planted, strict=True):
            rows[token, token * self.hidden_size // 12] = value


@contextlib.contextmanager
def matmul_precision(dtype: torch.dtype, tf32: bool) -> Iterator[None]:
    """Set torch's float32 products of a case, and leave them alone in another dtype."""
    if dtype != torch.float32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _short(dtype: torch.dtype | None) -> str:
    return "same" if dtype is None else SHORT_NAMES[dtype]


def place(values: Tensor, layout: str, gap: int = 8) -> Tensor:
    """Place `values` in a larger buffer of NaN, in one of LAYOUTS.

    rows: a gap after each row, another for each tensor of a case, so that no stride can stand for
    another; transposed: the first two dimensions the other way round in memory;
    expanded: stride 0 in the first dimension, whose first entry is repeated; scalar: stride 0 in
    all, as the gradient of a sum has it; spread: every second element; unaligned: one element
    behind an aligned address.
    """
    shape = list(values.shape)
    order = list(range(len(shape)))  # the dimensions in memory, the slowest first
    if layout == "transposed":
        order[:2] = order[1::-1]
    strides = [0] * len(shape)
    extent = 2 if layout == "spread" else 1
    for axis in reversed(order):
        strides[axis] = extent
        extent *= max(shape[axis], 1)
        if layout == "rows" and axis == order[-1]:
            extent += gap
    buffer = values.new_full((extent + 2 * _PADDING,), math.nan)
    view = buffer.as_strided(shape, strides, _PADDING + (layout == "unaligned"))
    view.copy_(values)
    if layout == "expanded":
        return view[:1].expand(shape)
    return view[(0,) * len(shape)].expand(shape) if layout == "scalar" else view
