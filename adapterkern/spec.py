"""One adapter call: `AdapterCall` holds its tensors and options, `AdapterSpec` all that is static.

`AdapterCall` owns its layout. Its fields that are annotated with Tensor are its tensors, in this
order everywhere: in the registered op, in autograd, in `Needs` and `Gradients`. All others are its
options. Every backend refuses an optional tensor that is given, and an option that differs from its
default, until it lists its feature.
"""

import functools
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from adapterkern import _torch
from adapterkern.activations import canonical_name
from adapterkern.results import Gradients, Needs
from adapterkern.validation import DROPOUT, EPS, name_of, norm_problems, real, validate

NORMS = ("none", "layer", "rms")
NORM_NAMES = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}  # by feature

# A registered op would give a wrong or no derivative for these, or would not understand them: such
# calls run as plain PyTorch operations under plain autograd.
PLAIN_FEATURES = frozenset({"dropout", "forward_ad", "functorch", "tensor_subclass"})

SCALING = "a float or a tensor of shape [1] or [H]"
_LARGEST = sys.float_info.max


class AdapterCall(NamedTuple):
    """y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up).

    The residual is `x` itself (add_input), another tensor (residual), or nothing. The scaling is
    the tensor `scaling` where given, else the float `scale`. `make_call` makes one, `with_norm`
    adds the norm that follows: then y is the stream, and `normed` the norm of it.
    """

    x: Tensor  # [..., H]
    down_weight: Tensor  # [R, H]
    up_weight: Tensor  # [H, R]
    down_bias: Tensor | None  # [R]
    up_bias: Tensor | None  # [H]
    residual: Tensor | None  # [..., H]
    skip: Tensor | None  # [..., H]
    scaling: Tensor | None  # [1] or [H]
    norm_weight: Tensor | None  # [H]
    norm_bias: Tensor | None  # [H]
    scale: float
    add_input: bool
    activation: str
    compute_dtype: torch.dtype  # of both products' operands: the autocast dtype, else x's
    dropout: float = 0.0  # on the scaled up-projection; reference only
    norm: str = "none"  # one of NORMS; without one, the fields below have no meaning
    eps: float = 1e-5  # added to the variance, or to the mean of the squares
    weight_offset: float = 0.0  # added to norm_weight
    cast_before_weight: bool = False  # whether the dtype of y rounds before norm_weight multiplies
    prenorm: bool = False  # whether y is asked for beside `normed`

    @property
    def hidden_size(self) -> int:
        return self.down_weight.shape[1]

    @property
    def bottleneck_size(self) -> int:
        return self.down_weight.shape[0]

    @property
    def num_tokens(self) -> int:
        return math.prod(shape_of(self.x)[:-1])

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype that the eager composition promotes to."""
        dtype = self.compute_dtype
        added = (self.scaling, self.x if self.add_input else self.residual, self.skip)
        for tensor in added:
            if tensor is not None:
                dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def normed_dtype(self) -> torch.dtype:
        """That of y, widened by the norm's parameters."""
        dtype = self.output_dtype
        for tensor in (self.norm_weight, self.norm_bias):
            if tensor is not None:
                dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def without_norm(self) -> "AdapterCall":
        """The call of y alone."""
        return self._replace(norm_weight=None, norm_bias=None, **_NO_NORM)

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name, in the order of `TENSOR_NAMES`."""
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    def options(self) -> dict[str, Any]:
        """The fields that are not tensors, by name."""
        return {name: getattr(self, name) for name in OPTION_NAMES}

    def for_backward(self, needs: Needs) -> "AdapterCall":
        """The call as the backward of `needs` reads it: with outlines, or less (`split`)."""
        roles = Roles.of(needs)
        return join(*split(tensor_values(self), roles), roles, option_values(self), self.x)

    def key(self) -> tuple:
        """All that validation and choice read, so that a second call like it costs one lookup.

        The number of tokens and the value of the scaling vary from call to call and are left out.
        """
        x, residual, skip = self.x, self.residual, self.skip
        shape = x.shape
        return (
            shape[-1], kind_of(x), self.scale == 1.0, options_but_scale(self),
            residual is not None and (residual.shape == shape, kind_of(residual)),
            skip is not None and (skip.shape == shape, kind_of(skip)),
            _torch.forward_ad_is_active(), _torch.functorch_is_active(),
            *[t is not None and signature_of(t) for t in _other_tensors(self)],
        )  # fmt: skip

    def spec(self) -> "AdapterSpec":
        """The static part of this call, validated (see `validation.validate`)."""
        tensors = self.tensors()
        problems = norm_problems(self.eps, self.weight_offset) if self.norm != "none" else []
        validate(tensors, self.compute_dtype, self.dropout, problems)
        bottleneck_size, hidden_size = self.down_weight.shape
        return AdapterSpec(
            operation="bottleneck_adapter",
            device=self.x.device,
            hidden_size=hidden_size,
            bottleneck_size=bottleneck_size,
            activation=self.activation,
            compute_dtype=self.compute_dtype,
            dtypes=tuple((n, t.dtype) for n, t in tensors.items() if t is not None),
            features=self.features(),
        )

    def features(self) -> frozenset[str]:
        """The names of all that this call needs beyond `act(x W_down^T) W_up^T`.

        An optional tensor that is given, and an option that differs from its default, is a feature
        by its own name unless `_FEATURE_OF` has another, so that a new field cannot be overlooked.
        """
        given = {name: t for name, t in self.tensors().items() if t is not None}
        changed = [n for n, value in _DEFAULTS.items() if getattr(self, n) != value]
        wanted = {
            f"{self.norm}_norm": self.norm != "none",
            "input_residual": self.add_input,
            "scaling": self.scaling is not None or self.scale != 1.0,
            "mixed_dtypes": any(t.dtype != self.compute_dtype for t in given.values()),
            "forward_ad": _torch.forward_ad_is_active(),
            "functorch": _torch.functorch_is_active(),
            "tensor_subclass": any(_torch.is_subclass(t) for t in given.values()),
        }
        present = [name for name, is_present in wanted.items() if is_present]
        optional = [name for name in given if name not in REQUIRED]
        named = [name for name in optional + changed if name not in _OF_NORM]
        return frozenset(present + [_FEATURE_OF.get(name, name) for name in named])


_hints = get_type_hints(AdapterCall)
TENSOR_NAMES = tuple(n for n, hint in _hints.items() if hint in (Tensor, Tensor | None))
OPTION_NAMES = tuple(name for name in _hints if name not in TENSOR_NAMES)
_DEFAULTS = dict(AdapterCall._field_defaults)
REQUIRED = tuple(name for name, hint in _hints.items() if hint is Tensor)
ADDED = ("residual", "skip")  # to the sum: of the shape of x, and no gradient needs their values
assert AdapterCall._fields == TENSOR_NAMES + OPTION_NAMES, "the tensors of a call come first"
_NO_NORM: dict[str, Any] = {
    name: _DEFAULTS[name]
    for name in ("norm", "eps", "weight_offset", "cast_before_weight", "prenorm")
}
_OF_NORM = {"norm_weight", "norm_bias", *_NO_NORM}  # one feature, "layer_norm" or "rms_norm"
_FEATURE_OF = {
    "down_bias": "bias",
    "up_bias": "bias",
    "residual": "external_residual",
    "scaling": "learned_scaling",
}

# The fields of a call as plain tuples: at every call, where a dict would take three times as long.
tensor_values = operator.attrgetter(*TENSOR_NAMES)
option_values = operator.attrgetter(*OPTION_NAMES)
_other_tensors = operator.attrgetter(*(n for n in TENSOR_NAMES if n not in ("x", *ADDED)))
options_but_scale = operator.attrgetter(*(n for n in OPTION_NAMES if n != "scale"))
signature_of = operator.attrgetter("shape", "dtype", "device", "layout", "__class__")
kind_of = operator.attrgetter("dtype", "device", "layout", "__class__")


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor of a call is itself rather than an outline, which stands in a backward for
    one whose values no gradient needs: [*shape, 0] in its dtype and on its device, so that there is
    nothing to read or to copy. No size of a call is 0 but for the number of tokens.
    """
    return tensor.shape[-1] > 0


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of a tensor of a call, also from its outline."""
    return tensor.shape if has_values(tensor) else tensor.shape[:-1]


assert Needs._fields == Gradients._fields == TENSOR_NAMES, "a gradient for every tensor"


class Roles(NamedTuple):
    """What the gradients asked for need of the tensors of a call, as positions in its fields."""

    values: tuple[int, ...]  # which equations (5) to (13) and (19) read
    described: tuple[int, ...]  # shape and dtype alone
    z: bool
    stream: bool  # if there is a norm

    @staticmethod
    @functools.cache  # of tuples of bools there are few
    def of(needs: Needs) -> "Roles":
        """The roles for these gradients."""
        values = Needs(
            x=needs.down_weight,
            down_weight=needs.x,
            up_weight=needs.dz or needs.scaling,
            up_bias=needs.scaling,
            scaling=needs.dz or needs.up_weight or needs.up_bias,
            norm_weight=needs.sum,
        )
        known = needs._replace(x=True, down_weight=True, up_weight=True, residual=False, skip=False)
        pairs = list(enumerate(zip(values, known, strict=True)))
        return Roles(
            tuple(index for index, (keeps, _) in pairs if keeps),
            tuple(index for index, (keeps, describes) in pairs if describes and not keeps),
            needs.z,
            needs.stream,
        )


Outline = tuple[int, torch.Size, torch.dtype]  # the position of a tensor, and what is known of it


def split(
    tensors: Sequence[Tensor | None], roles: Roles
) -> tuple[list[Tensor | None], list[Outline]]:
    """What a backward keeps of the tensors of a call: values, or else outlines, or else nothing."""
    kept = [tensors[index] for index in roles.values]
    outlines = [
        (index, tensor.shape, tensor.dtype)
        for index in roles.described
        if (tensor := tensors[index]) is not None
    ]
    return kept, outlines


def join(
    kept: Iterable[Tensor | None],
    outlines: Iterable[Outline],
    roles: Roles,
    options: Iterable[Any],
    like: Tensor,
) -> AdapterCall:
    """The call of a backward from what `split` kept of it; outlines lie where `like` does."""
    tensors: list[Tensor | None] = [None] * len(TENSOR_NAMES)
    for index, tensor in zip(roles.values, kept, strict=True):
        tensors[index] = tensor
    for index, shape, dtype in outlines:
        tensors[index] = like.new_empty((*shape, 0), dtype=dtype)
    return AdapterCall(*tensors, *options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class AdapterSpec:
    """The static, hashable part of a call: all that decides which backend runs it."""

    operation: str
    device: torch.device
    hidden_size: int
    bottleneck_size: int
    activation: str
    compute_dtype: torch.dtype
    dtypes: tuple[tuple[str, torch.dtype], ...]
    features: frozenset[str]
    slots: int | None = None  # of many adapters in one batch

    @property
    def norm(self) -> str | None:
        """The class of the norm behind the adapter, None without one."""
        return next((n for f, n in NORM_NAMES.items() if f in self.features), None)

    def without_norm(self) -> "AdapterSpec":
        """The spec of the same call without its norm."""
        return replace(self, features=self.features - frozenset(NORM_NAMES))

    def describe(self) -> str:
        features = ", ".join(sorted(self.features)) or "none"
        slots = "" if self.slots is None else f"slots={self.slots} "
        return (
            f"{slots}H={self.hidden_size} R={self.bottleneck_size} {self.activation} "
            f"{name_of(self.compute_dtype)} on {self.device}, features: {features}"
        )


def make_call(
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: str | Tensor | None = "input",
    skip: Tensor | None = None,
    activation: str = "gelu",
    scaling: float | Tensor = 1.0,
    dropout: float = 0.0,
) -> AdapterCall:
    """Make an `AdapterCall` of the arguments of `adapterkern.bottleneck_adapter`.

    Raises:
        TypeError: x is no tensor, dropout no number, or scaling neither.
        ValueError: unknown activation, a residual that is a string other than "input", or a scaling
            that is not finite.
    """
    add_input = residual is x
    if isinstance(residual, str):
        if residual != "input":
            raise ValueError(f'residual must be "input", a tensor or None, got {residual!r}.')
        add_input = True
    learned, scale = None, scaling
    if type(scaling) is not float:  # as it nearly always is, also where torch.compile traces
        learned = scaling if isinstance(scaling, Tensor) else None
        scale = 1.0 if learned is not None else real("scaling", scaling, SCALING)
    if not -_LARGEST <= scale <= _LARGEST:  # a float by now
        raise ValueError(
            f"scaling must be finite, got {scale}.\n"
            "  hint: a schedule that divides by zero gives such a number."
        )
    return AdapterCall(
        x,
        down_weight,
        up_weight,
        down_bias,
        up_bias,
        None if add_input else residual,  # type: ignore[arg-type]  # a str adds the input
        skip,
        learned,
        None,
        None,
        scale,  # type: ignore[arg-type]  # a float by now
        add_input,
        canonical_name(activation),
        compute_dtype_of(x),
        dropout if type(dropout) is float else real("dropout", dropout, DROPOUT),
    )


def with_norm(
    call: AdapterCall,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    weight_offset: float,
    cast_before_weight: bool,
    prenorm: bool,
) -> AdapterCall:
    """The call with the norm of `adapterkern.bottleneck_adapter_norm` behind it.

    Raises:
        TypeError: eps or weight_offset is no number.
        ValueError: an unknown norm.
    """
    if norm not in NORMS[1:]:
        raise ValueError(f'norm must be "layer" or "rms", got {norm!r}.')
    return call._replace(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm=norm,
        eps=eps if type(eps) is float else real("eps", eps, EPS),
        weight_offset=real("weight_offset", weight_offset, "a number"),
        cast_before_weight=bool(cast_before_weight),
        prenorm=bool(prenorm),
    )


def compute_dtype_of(x: Tensor) -> torch.dtype:
    """The dtype in which eager would run the linear layers: autocast's where it is on, else x's."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}.")
    if not _torch.may_autocast():
        return x.dtype
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        # Autocast leaves float64 alone; integers are refused by validation, in their own name.
        castable = x.is_floating_point() and x.dtype != torch.float64
        return torch.get_autocast_dtype(device) if castable else x.dtype
    return x.dtype
