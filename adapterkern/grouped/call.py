"""One call of many adapters: `GroupedCall`, and what its gradients are called.

Its layout is told as that of `spec.AdapterCall` is: fields annotated with Tensor come first, in the
order that they have in the registered op and in autograd; all others are its options.
"""

import math
import operator
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from adapterkern import _torch
from adapterkern.activations import canonical_name
from adapterkern.grouped.validation import ROUTING, grouped_problems
from adapterkern.spec import (
    ADDED,
    AdapterSpec,
    compute_dtype_of,
    has_values,
    kind_of,
    shape_of,
    signature_of,
)
from adapterkern.validation import refuse

OPERATION = "grouped_bottleneck_adapter"
# Tokens of one adapter that share a tile: every group of `order` begins at a multiple of it.
TILE = 64


class GroupedCall(NamedTuple):
    """y[t] = residual[t] + skip[t] + s_i * (act(x[t] D_i^T + b_i) U_i^T + c_i), where i is the slot
    of token t; without a slot, residual[t] + skip[t]. `make_grouped_call` makes one.

    The last four tensors are the buffers of an `AdapterRouting`, which describes them; they may be
    made for more than T tokens.
    """

    x: Tensor  # [..., H], T tokens
    down_weights: Tensor  # [S, R, H]
    up_weights: Tensor  # [S, H, R]
    down_biases: Tensor | None  # [S, R]
    up_biases: Tensor | None  # [S, H]
    residual: Tensor | None  # [..., H]
    skip: Tensor | None  # [..., H]
    scalings: Tensor | None  # [S] float32 (float64 in float64); 1 without
    ranks: Tensor | None  # [S] int32, the units of each slot that exist; R without
    token_slots: Tensor  # [at least T] int32
    order: Tensor  # int32
    tiles: Tensor  # [_, 3] int32
    slot_offsets: Tensor  # [S + 2] int32
    add_input: bool
    activation: str
    compute_dtype: torch.dtype  # of both products' operands
    gradient: bool  # whether one is asked for, of whatever tensor

    @property
    def slots(self) -> int:
        return shape_of(self.down_weights)[0]

    @property
    def hidden_size(self) -> int:
        return shape_of(self.down_weights)[2]

    @property
    def bottleneck_size(self) -> int:
        """R, the width of the widest adapter that fits a slot."""
        return shape_of(self.down_weights)[1]

    @property
    def num_tokens(self) -> int:
        return math.prod(shape_of(self.x)[:-1])

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype that the eager composition promotes to."""
        dtype = self.compute_dtype
        for tensor in (self.x if self.add_input else self.residual, self.skip):
            if tensor is not None:
                dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name, in the order of `TENSOR_NAMES`."""
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    def options(self) -> dict[str, Any]:
        """The fields that are not tensors, by name."""
        return {name: getattr(self, name) for name in OPTION_NAMES}

    def for_backward(self, needs: "GroupedNeeds") -> "GroupedCall":
        """The call as a backward reads it: without what is added, which no gradient needs, and with
        an outline of x (`spec.has_values`) where no gradient needs its values, which those of a
        gradient do wherever it needs z.
        """
        call = self._replace(residual=None, skip=None)
        if needs.z or not has_values(self.x):
            return call
        return call._replace(x=self.x.new_empty((*self.x.shape, 0)))

    def key(self) -> tuple:
        """All that validation and choice read; the number of tokens is left out."""
        x, residual, skip = self.x, self.residual, self.skip
        shape = x.shape
        return (
            shape[-1], kind_of(x), option_values(self),
            shape.numel() <= len(self.token_slots) * shape[-1],
            residual is not None and (residual.shape == shape, kind_of(residual)),
            skip is not None and (skip.shape == shape, kind_of(skip)),
            self.scalings is not None and self.scalings.requires_grad,
            _torch.forward_ad_is_active(), _torch.functorch_is_active(),
            *[t is not None and signature_of(t) for t in _other_tensors(self)],
        )  # fmt: skip

    def spec(self) -> AdapterSpec:
        """The static part of this call, validated.

        Raises:
            TypeError, ValueError: as `validation.validate`.
        """
        tensors = self.tensors()
        refuse(grouped_problems(tensors, self.compute_dtype))
        floating = {n: t for n, t in tensors.items() if t is not None and n not in _INTEGERS}
        return AdapterSpec(
            operation=OPERATION,
            device=self.x.device,
            hidden_size=self.hidden_size,
            bottleneck_size=self.bottleneck_size,
            activation=self.activation,
            compute_dtype=self.compute_dtype,
            dtypes=tuple((n, t.dtype) for n, t in floating.items() if n != "scalings"),
            features=self.features(),
            slots=self.slots,
        )

    def features(self) -> frozenset[str]:
        """The names of all that this call needs beyond `act(x D_i^T) U_i^T`."""
        given = {n: t for n, t in self.tensors().items() if t is not None}
        floating = [t for n, t in given.items() if n not in _INTEGERS and n != "scalings"]
        wanted = {
            "bias": self.down_biases is not None or self.up_biases is not None,
            "input_residual": self.add_input,
            "external_residual": self.residual is not None,
            "skip": self.skip is not None,
            "scaling": self.scalings is not None,
            "learned_scaling": self.scalings is not None and self.scalings.requires_grad,
            "ranks": self.ranks is not None,
            "gradient": self.gradient,
            "mixed_dtypes": any(t.dtype != self.compute_dtype for t in floating),
            "forward_ad": _torch.forward_ad_is_active(),
            "functorch": _torch.functorch_is_active(),
            "tensor_subclass": any(_torch.is_subclass(t) for t in given.values()),
        }
        return frozenset(name for name, is_present in wanted.items() if is_present)


_hints = get_type_hints(GroupedCall)
TENSOR_NAMES = tuple(n for n, hint in _hints.items() if hint in (Tensor, Tensor | None))
OPTION_NAMES = tuple(name for name in _hints if name not in TENSOR_NAMES)
assert GroupedCall._fields == TENSOR_NAMES + OPTION_NAMES, "the tensors of a call come first"
_INTEGERS = ("ranks", *ROUTING)

tensor_values = operator.attrgetter(*TENSOR_NAMES)
option_values = operator.attrgetter(*OPTION_NAMES)
_other_tensors = operator.attrgetter(*(n for n in TENSOR_NAMES if n not in ("x", *ADDED)))


class GroupedNeeds(NamedTuple):
    """Which gradients are asked for: the tensors of `GroupedCall` that can have one."""

    x: bool = False
    down_weights: bool = False
    up_weights: bool = False
    down_biases: bool = False
    up_biases: bool = False
    residual: bool = False
    skip: bool = False
    scalings: bool = False

    @property
    def dz(self) -> bool:
        """Whether the gradient of the pre-activation is needed on the way."""
        return self.x or self.down_weights or self.down_biases

    @property
    def z(self) -> bool:
        """Whether the pre-activation is needed."""
        return self.dz or self.up_weights or self.scalings

    @property
    def parameters(self) -> bool:
        """Whether a gradient is a sum over tokens."""
        weights = self.down_weights or self.up_weights
        return weights or self.down_biases or self.up_biases or self.scalings


class GroupedGradients(NamedTuple):
    """Gradients of one call, each in its tensor's shape and dtype; None where not asked for.

    Those of slots that no token used, and of units beyond a slot's rank, are zero. Those of
    residual and skip are in the dtype of y.
    """

    x: Tensor | None = None
    down_weights: Tensor | None = None
    up_weights: Tensor | None = None
    down_biases: Tensor | None = None
    up_biases: Tensor | None = None
    residual: Tensor | None = None
    skip: Tensor | None = None
    scalings: Tensor | None = None


assert GroupedNeeds._fields == GroupedGradients._fields == TENSOR_NAMES[: len(GroupedNeeds._fields)]


def make_grouped_call(
    x: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    down_biases: Tensor | None,
    up_biases: Tensor | None,
    residual: str | Tensor | None,
    skip: Tensor | None,
    scalings: Tensor | None,
    ranks: Tensor | None,
    routing: tuple[Tensor, Tensor, Tensor, Tensor],
    activation: str,
    gradient: bool,
) -> GroupedCall:
    """Make a `GroupedCall` of the arguments of `adapterkern.grouped_bottleneck_adapter`.

    Args:
        routing: the buffers of an `AdapterRouting`, in the order of `ROUTING`.
        gradient: whether something that the call does not hold asks for a gradient of it.

    Raises:
        TypeError: x is no tensor.
        ValueError: unknown activation, or a residual that is a string other than "input".
    """
    add_input = residual is x
    if isinstance(residual, str):
        if residual != "input":
            raise ValueError(f'residual must be "input", a tensor or None, got {residual!r}.')
        add_input = True
    compute_dtype = compute_dtype_of(x)
    if isinstance(scalings, Tensor) and scalings.dtype in (torch.float16, torch.bfloat16):
        scalings = scalings.float()
    call = GroupedCall(
        x,
        down_weights,
        up_weights,
        down_biases,
        up_biases,
        None if add_input else residual,  # type: ignore[arg-type]  # a str adds the input
        skip,
        scalings,
        ranks,
        *routing,
        add_input,
        canonical_name(activation),
        compute_dtype,
        gradient,
    )
    # Replaced in any case: torch.compile of torch 2.9 knows the properties of no other.
    return call._replace(gradient=gradient or needs_gradient(call))


def needs_gradient(call: GroupedCall) -> bool:
    """Whether autograd records the call for one of its tensors."""
    if not torch.is_grad_enabled():
        return False
    given = call[: len(GroupedNeeds._fields)]  # torch.compile traces a slice, and no attrgetter
    return any(isinstance(t, Tensor) and t.requires_grad for t in given)


def num_tiles(num_tokens: int, slots: int) -> int:
    """The most tiles of a routing that so many tokens can take: the grid of a launch."""
    return -(-(num_tokens + min(num_tokens, slots) * (TILE - 1)) // TILE)
