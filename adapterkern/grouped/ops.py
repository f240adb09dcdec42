"""The op of many adapters as torch sees it, beside that of `adapterkern.ops`, which says why it is
made of `Library.define` and a ctx-style `autograd.Function`. Not public.

The adapters of a bank are one Parameter each, which lie in the stacked tensors of the call: these
are its `leaves`. Their gradients are parts of the stacked ones, and a leaf of a slot that no token
took is not handed over, so that it gets none.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from adapterkern import _torch
from adapterkern.backends import get
from adapterkern.backends.base import empty_grouped_gradients, empty_grouped_outputs
from adapterkern.grouped import reference
from adapterkern.grouped.call import (
    TENSOR_NAMES,
    GroupedCall,
    GroupedGradients,
    GroupedNeeds,
    option_values,
    tensor_values,
)
from adapterkern.ops import log_plain_backward, schema
from adapterkern.spec import has_values, shape_of

KINDS = ("down_weights", "up_weights", "down_biases", "up_biases", "scalings")  # that have leaves
_FIELD = [GroupedNeeds._fields.index(kind) for kind in KINDS]


class Leaves(NamedTuple):
    """Parameters that are the front part of one slot each of a stacked tensor."""

    kinds: tuple[int, ...]  # indices in `KINDS`
    slots: tuple[int, ...]
    parameters: tuple[Tensor, ...]

    def each(self) -> Iterable[tuple[int, int, Tensor]]:
        """Kind, slot and parameter of each."""
        return zip(self.kinds, self.slots, self.parameters, strict=True)

    def as_arguments(self) -> tuple[list[Tensor], list[int], list[int]]:
        """As the op takes them."""
        return list(self.parameters), list(self.kinds), list(self.slots)


NO_LEAVES = Leaves((), (), ())


def leaves_of(adapters: Iterable[tuple[int, Sequence[Tensor | None]]]) -> Leaves:
    """The leaves of adapters, each a slot and its parameters in the order of `KINDS`."""
    leaves = [
        (kind, slot, parameter)
        for slot, parameters in adapters
        for kind, parameter in enumerate(parameters)
        if parameter is not None
    ]
    return Leaves(*map(tuple, zip(*leaves, strict=True))) if leaves else NO_LEAVES


_library = torch.library.Library("adapterkern", "FRAGMENT")
_library.define(
    "grouped_forward(str backend, bool save, Tensor[] leaves, int[] kinds, int[] slots, "
    f"{schema(GroupedCall)}) -> (Tensor y, Tensor z)"
)
_library.define(
    f"grouped_backward(str backend, bool[] needs, {schema(GroupedCall)}, Tensor? z_saved, "
    "Tensor grad_y) -> Tensor[]"
)


def _forward_kernel(
    backend: str, save: bool, leaves: list[Tensor], kinds: list[int], slots: list[int], *fields: Any
) -> tuple[Tensor, Tensor]:
    y, z = get(backend).grouped_forward(GroupedCall(*fields), save)
    return y, y.new_empty(0) if z is None else z


def _forward_fake(
    backend: str, save: bool, leaves: list[Tensor], kinds: list[int], slots: list[int], *fields: Any
) -> tuple[Tensor, Tensor]:
    y, z = empty_grouped_outputs(GroupedCall(*fields), save)
    return y, y.new_empty(0) if z is None else z


def _backward_kernel(backend: str, needs: Sequence[bool], *fields: Any) -> list[Tensor]:
    *of_call, z, dy = fields
    asked = GroupedNeeds(*needs)._replace(residual=False, skip=False)
    gradients = get(backend).grouped_backward(GroupedCall(*of_call), z, dy, asked)
    return [g for g in gradients if g is not None]


def _backward_fake(backend: str, needs: Sequence[bool], *fields: Any) -> list[Tensor]:
    *of_call, _, _ = fields
    computed = empty_grouped_gradients(GroupedCall(*of_call), GroupedNeeds(*needs))
    return [g for g in computed if g is not None]


for _name, _impl, _fake in (
    ("grouped_forward", _forward_kernel, _forward_fake),
    ("grouped_backward", _backward_kernel, _backward_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adapterkern::{_name}", _fake, lib=_library)

_forward_op = torch.ops.adapterkern.grouped_forward.default
_backward_op = torch.ops.adapterkern.grouped_backward.default


class _GroupedAdapter(torch.autograd.Function):
    """Autograd of one call; the forward's backend runs the backward. `tensors` are those of `call`,
    then the parameters of its leaves.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: str, save: bool, call: GroupedCall, leaves: Leaves, *tensors: Any
    ) -> Any:
        _, _, _, _, *asked = ctx.needs_input_grad
        needs = _needs(asked, leaves)
        y, z = _forward(backend, call, save or needs.z, leaves)
        ctx.backend, ctx.leaves, ctx.needs = backend, leaves._replace(parameters=()), needs
        ctx.options = option_values(call)
        kept = tensor_values(call.for_backward(needs))
        ctx.save_for_backward(*kept, z if needs.z else None, *leaves.parameters)
        ctx.set_materialize_grads(False)
        if not save:
            return y
        ctx.mark_non_differentiable(z)
        return y, z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        _, _, _, _, *asked = ctx.needs_input_grad
        if dy is None:
            return (None, None, None, None, *[None for _ in asked])
        values = _saved(ctx)
        call = GroupedCall(*values[: len(TENSOR_NAMES)], *ctx.options)
        z, *parameters = values[len(TENSOR_NAMES) :]
        leaves = ctx.leaves._replace(parameters=tuple(parameters))
        if torch.is_grad_enabled():  # create_graph=True: to be differentiated itself
            gradients = _differentiable(call, leaves, dy, asked)
        else:
            stacked = _backward(ctx.backend, call, z, dy, ctx.needs)
            gradients = [g if need else None for g, need in zip(stacked, asked, strict=False)]
            gradients += [None] * (len(TENSOR_NAMES) - len(stacked))
            gradients += [
                part_of(stacked[_FIELD[kind]], kind, slot, parameter.shape) if need else None
                for (kind, slot, parameter), need in zip(
                    leaves.each(), asked[len(TENSOR_NAMES) :], strict=True
                )
            ]
        return (None, None, None, None, *gradients)


def _saved(ctx: Any) -> tuple[Any, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{error}\n  hint: an AdapterRouting that is updated, and a bank that gets or loses an "
            "adapter or steps one, between a forward and its backward spoil that backward; give "
            "each batch that waits for its backward a routing of its own, and step after the last."
        ) from error


def _needs(asked: Sequence[bool], leaves: Leaves) -> GroupedNeeds:
    """The gradients of the stacked tensors that are asked for, by themselves or by a leaf."""
    needs = list(asked[: len(GroupedNeeds._fields)])
    for (kind, _, _), need in zip(leaves.each(), asked[len(TENSOR_NAMES) :], strict=True):
        needs[_FIELD[kind]] |= need
    return GroupedNeeds(*needs)


def _differentiable(
    call: GroupedCall, leaves: Leaves, dy: Tensor, asked: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients in plain operations, of what is in `asked`."""
    log_plain_backward("many adapters")
    inputs = [*tensor_values(call), *leaves.parameters]
    # What is added has the gradient of y itself; a forward does not keep it.
    index = {name: place for place, name in enumerate(TENSOR_NAMES)}
    added = {index["residual"], index["skip"]}
    wanted = [i for i, need in enumerate(asked) if need and i not in added]
    if not has_values(call.x):  # then no gradient below depends on them
        call = call._replace(x=call.x.new_zeros(shape_of(call.x)))
    found: dict[int, Any] = {}
    if wanted:
        y = plain(call, leaves)
        gradients = torch.autograd.grad(
            y, [inputs[i] for i in wanted], dy, create_graph=True, allow_unused=True
        )
        found = dict(zip(wanted, gradients, strict=True))
    found |= {i: dy for i in added if asked[i]}
    return [found.get(i) for i in range(len(asked))]


def plain(call: GroupedCall, leaves: Leaves) -> Tensor:
    """y in plain operations of the leaves, where there are some, and of the call's own tensors."""
    return reference.plain(with_stacks(call, leaves))


def with_stacks(call: GroupedCall, leaves: Leaves) -> GroupedCall:
    """The call with new stacked tensors, into which operations of autograd copy the leaves."""
    stacks: dict[str, list[Tensor]] = {}
    for kind, slot, parameter in leaves.each():
        name = KINDS[kind]
        whole = getattr(call, name)
        parts = stacks.setdefault(name, list(whole.detach().unbind(0)))
        # A scaling has one dimension more than its part. (torch 2.9 traces no zip of two lengths.)
        missing = [(0, m - parameter.shape[i]) for i, m in enumerate(parts[slot].shape)]
        filled = F.pad(parameter, [size for pair in reversed(missing) for size in pair])
        parts[slot] = filled.view(parts[slot].shape)
    replaced: dict[str, Any] = {name: torch.stack(parts) for name, parts in stacks.items()}
    return call._replace(**replaced)


def part_of(stacked: Tensor | None, kind: int, slot: int, shape: Sequence[int]) -> Tensor:
    """The front part of a slot that has the shape of its parameter."""
    assert stacked is not None
    if KINDS[kind] == "scalings":
        return stacked[slot : slot + 1]
    return stacked[slot][tuple(slice(size) for size in shape)]


def stack_of(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts as one new tensor without gaps, each at the front of its slot, filled up with
    zeros; a part that is missing is zeros, and without any there is no tensor.
    """
    there = [part for part in parts if part is not None]
    if not there:
        return None
    shape = [max(sizes) for sizes in zip(*(part.shape for part in there), strict=True)]
    if len(there) == len(parts) and all(list(part.shape) == shape for part in there):
        return torch.stack(there)
    stack = there[0].new_zeros((len(parts), *shape))
    for slot, part in enumerate(parts):
        if part is not None:
            stack[slot][tuple(slice(size) for size in part.shape)].copy_(part)
    return stack


_apply = _torch.apply_of(_GroupedAdapter)


def _forward(
    backend: str, call: GroupedCall, save: bool, leaves: Leaves
) -> tuple[Tensor, Tensor | None]:
    """Run the forward below autograd, as an op where operations are watched, faked or counted."""
    if not _torch.is_watched(call.x):
        return get(backend).grouped_forward(call, save)
    y, z = _torch.below_autograd(_forward_op, backend, save, *leaves.as_arguments(), *call)
    return y, z if save else None


def _backward(
    backend: str, call: GroupedCall, z: Tensor | None, dy: Tensor, needs: GroupedNeeds
) -> GroupedGradients:
    """Run the backward, as an op where operations are traced, faked or counted."""
    asked = needs._replace(residual=False, skip=False)
    added = {n: dy if getattr(needs, n) else None for n in ("residual", "skip")}
    if not any(asked):
        return GroupedGradients(**added)
    if not torch.compiler.is_compiling() and not _torch.is_watched(dy):
        if backend != "reference" and _torch.has_views_of_values([dy]):
            dy = dy.clone()
        return get(backend).grouped_backward(call, z, dy, asked)._replace(**added)
    computed = iter(_backward_op(backend, list(asked), *call, z, dy))
    found = [next(computed) if need else None for need in asked]
    return GroupedGradients(*found)._replace(**added)


def _forward_autograd(
    backend: str, save: bool, leaves: list[Tensor], kinds: list[int], slots: list[int], *fields: Any
) -> tuple[Tensor, Tensor]:
    """The autograd kernel of the forward op, for calls from a graph."""
    call, of_bank = GroupedCall(*fields), Leaves(tuple(kinds), tuple(slots), tuple(leaves))
    if _torch.forward_ad_is_active():
        y = plain(call, of_bank)
        return y, y.new_empty(0)
    if not call.gradient or not torch.is_grad_enabled():
        y, z = _forward(backend, call, save, of_bank)
        return y, y.new_empty(0) if z is None else z
    return _GroupedAdapter.apply(backend, True, call, of_bank, *tensor_values(call), *leaves)


_library.impl("grouped_forward", _forward_autograd, "Autograd")


def run(call: GroupedCall, backend: str, leaves: Leaves = NO_LEAVES) -> Tensor:
    """y of a validated call on the backend of that name, recorded where a gradient is needed."""
    if torch.compiler.is_compiling():
        return _forward_op(backend, call.gradient, *leaves.as_arguments(), *call)[0]
    if backend != "reference" and _torch.has_views_of_values([call.x]):
        call = call._replace(x=call.x.clone())
    if call.gradient:
        return _apply(backend, False, call, leaves, *tensor_values(call), *leaves.parameters)
    return _forward(backend, call, False, leaves)[0]


def _flops(call: Any, products: int) -> int:
    tokens = math.prod(call.x[:-1])
    return products * 2 * tokens * math.prod(call.down_weights[1:])


def _forward_flops(
    backend: str, save: bool, leaves: Any, kinds: Any, slots: Any, *fields: Any, **_: Any
) -> int:
    """As if every token had an adapter of the bank's full width: the routing is not looked at."""
    return _flops(GroupedCall(*fields), 2)


def _backward_flops(backend: str, needs: Sequence[bool], *fields: Any, **_: Any) -> int:
    asked = GroupedNeeds(*needs)
    products = asked.dz + asked.x + asked.down_weights + (asked.up_weights or asked.scalings)
    shapes: Any = GroupedCall(*fields[: len(GroupedCall._fields)])
    return _flops(shapes, products)


register_flop_formula(torch.ops.adapterkern.grouped_forward)(_forward_flops)
register_flop_formula(torch.ops.adapterkern.grouped_backward)(_backward_flops)
