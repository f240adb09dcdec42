"""The semantic truth of many adapters: tokens gathered by slot, `adapterkern.reference` for each,
results scattered. docs/math.md, equation (24), numbers what is new.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adapterkern import _torch, reference
from adapterkern.grouped.call import GroupedCall, GroupedGradients, GroupedNeeds
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.spec import AdapterCall, has_values, shape_of


class Run(NamedTuple):
    """The tokens of one slot, of those that are sorted by slot."""

    slot: int
    rank: int  # above 0
    tokens: slice


def forward(call: GroupedCall, save: bool = True) -> tuple[Tensor, Tensor | None]:
    """y [..., H], and with `save` the pre-activation z [T, R], zero where there is none."""
    y = without_adapter(call)
    with torch.no_grad(), reference.without_autocast(call.x):
        tokens, runs = sorted_tokens(call)
        by_slot = _gathered(call, tokens)
        shape = len(tokens), call.bottleneck_size
        z_by_slot = y.new_zeros(shape, dtype=call.compute_dtype) if save else None
        found = []
        for run in runs:
            outputs, saved = reference.forward(of_slot(by_slot, run.slot, run.rank, run.tokens))
            assert outputs.y is not None
            found.append(outputs.y.to(y.dtype))
            if z_by_slot is not None and saved.z is not None:
                z_by_slot[run.tokens, : run.rank] = saved.z
        if found:
            y.view(-1, call.hidden_size)[tokens] = torch.cat(found)
        if z_by_slot is None:
            return y, None
        z = z_by_slot.new_zeros((call.num_tokens, call.bottleneck_size))
        z[tokens] = z_by_slot
        return y, z


def plain(call: GroupedCall) -> Tensor:
    """y in plain operations that autograd, functorch and exports understand, since no shape depends
    on a value: every adapter runs on every token, so it takes S times as long.
    """
    with reference.without_autocast(call.x):
        y = without_adapter(call)
        num_tokens, slots_there, units = _sizes(call)
        slots = call.token_slots[:num_tokens].view(*call.x.shape[:-1], 1)
        for slot in range(slots_there):
            one = of_slot(call, slot, None, slice(None))
            if call.ranks is not None:
                exists = torch.arange(units, device=y.device) < call.ranks[slot]
                one = _masked(one, exists, call.ranks[slot] > 0)
            outputs, _ = reference.forward(one)
            assert outputs.y is not None
            y = torch.where(slots == slot, outputs.y.to(y.dtype), y)
        return y


def _sizes(call: GroupedCall) -> tuple[int, int, int]:
    """T, S and R, without the warnings of torch.jit.trace, which holds them fast."""
    if torch.compiler.is_compiling() or not _torch.jit_is_tracing():
        return call.num_tokens, call.slots, call.bottleneck_size
    with _torch.jit_tracing_paused():
        return call.num_tokens, call.slots, call.bottleneck_size


def _masked(one: AdapterCall, exists: Tensor, any_exists: Tensor) -> AdapterCall:
    """The call with zeros in the weights of units that do not exist, where NaN may be, so that they
    add nothing whatever the activation makes of zero.
    """
    down_bias, up_bias = one.down_bias, one.up_bias
    return one._replace(
        down_weight=torch.where(exists[:, None], one.down_weight, 0.0),
        up_weight=torch.where(exists, one.up_weight, 0.0),
        down_bias=None if down_bias is None else torch.where(exists, down_bias, 0.0),
        up_bias=None if up_bias is None else torch.where(any_exists, up_bias, 0.0),
    )


def backward(
    call: GroupedCall, z: Tensor | None, dy: Tensor, needs: GroupedNeeds
) -> GroupedGradients:
    """The gradients in `needs`, equations (5) to (12) for the tokens of each slot."""
    hidden = call.hidden_size
    named: dict[str, Any] = call.tensors()
    names = ("down_weights", "up_weights", "down_biases", "up_biases", "scalings")
    found: dict[str, Tensor] = {
        name: dy.new_zeros(shape_of(named[name]), dtype=named[name].dtype)
        for name in names
        if getattr(needs, name)
    }
    flat = dy.reshape(-1, hidden)
    dx = None
    if needs.x:
        dx = (flat.clone() if call.add_input else torch.zeros_like(flat)).to(call.x.dtype)
    asked = Needs(
        needs.x, needs.down_weights, needs.up_weights, needs.down_biases, needs.up_biases,
        scaling=needs.scalings,
    )  # fmt: skip
    with reference.without_autocast(dy):
        tokens, runs = sorted_tokens(call)
        by_slot, dy_by_slot, of_tokens = _gathered(call, tokens), flat[tokens], []
        z_by_slot = None if z is None else z[tokens]
        for slot, rank, part in runs:
            one = of_slot(by_slot, slot, rank, part)
            saved = Saved(None if z_by_slot is None else z_by_slot[part, :rank])
            g = reference.backward(one, saved, Outputs(dy_by_slot[part]), asked)
            if g.x is not None:
                of_tokens.append(g.x)
            of_units = {"down_weights": g.down_weight, "down_biases": g.down_bias}
            for name, gradient in of_units.items():
                if gradient is not None:
                    found[name][slot, :rank] = gradient
            if g.up_weight is not None:
                found["up_weights"][slot, :, :rank] = g.up_weight
            if g.up_bias is not None:
                found["up_biases"][slot] = g.up_bias
            if g.scaling is not None:
                found["scalings"][slot] = g.scaling[0]
        if dx is not None and of_tokens:
            dx[tokens] = torch.cat(of_tokens)
    return GroupedGradients(
        x=None if dx is None else dx.view(shape_of(call.x)),
        residual=dy if needs.residual else None,
        skip=dy if needs.skip else None,
        **found,
    )


def without_adapter(call: GroupedCall, copies: bool = True) -> Tensor:
    """residual + skip [..., H], a new and contiguous tensor if `copies`."""
    dtype, added = call.output_dtype, call.x if call.add_input else call.residual
    if added is None:
        y = call.x.new_zeros(call.x.shape, dtype=dtype)
    else:
        y = added.to(dtype)
    if call.skip is not None:
        return (y + call.skip).contiguous()
    return y.clone(memory_format=torch.contiguous_format) if copies else y


def sorted_tokens(call: GroupedCall) -> tuple[Tensor, list[Run]]:
    """The tokens of slots with a rank above 0, slot by slot, and which of them are each slot's. The
    host waits for the device; on the meta device, where nothing tells them, there are none.
    """
    order, offsets = call.order, call.slot_offsets[:-1].long()
    if offsets.is_meta:
        return order.new_empty(0, dtype=torch.int64), []
    most = call.bottleneck_size  # as kernels read what is out of range
    ranks = [most] * call.slots if call.ranks is None else call.ranks.clamp(0, most).tolist()
    exists = (order >= 0) & (order < call.num_tokens)
    if 0 in ranks:
        slots = call.token_slots[order.clamp(0, len(call.token_slots) - 1)].long()
        exists &= call.ranks[slots] > 0  # type: ignore[index]  # a token without one comes last
    before = F.pad(exists.cumsum(0), (1, 0))[offsets].tolist()
    tokens = order[: int(offsets[-1])][exists[: int(offsets[-1])]].long()
    runs = [
        Run(slot, ranks[slot], slice(first, last))
        for slot, (first, last) in enumerate(itertools.pairwise(before))
        if last > first
    ]
    return tokens, runs


def _gathered(call: GroupedCall, tokens: Tensor) -> GroupedCall:
    """The call with the rows of these tokens alone, [N, H]."""

    def rows(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if not has_values(tensor):
            return tensor.new_empty((len(tokens), call.hidden_size, 0))
        return tensor.reshape(-1, call.hidden_size)[tokens]

    return call._replace(x=rows(call.x), residual=rows(call.residual), skip=rows(call.skip))


def of_slot(call: GroupedCall, slot: int, rank: int | None, tokens: slice) -> AdapterCall:
    """The call of one slot's adapter on these rows; rank None: of all units."""
    residual, skip = call.residual, call.skip
    scalings, down, up = call.scalings, call.down_biases, call.up_biases
    return AdapterCall(
        x=call.x[tokens],
        down_weight=call.down_weights[slot, :rank],
        up_weight=call.up_weights[slot, :, :rank],
        down_bias=None if down is None else down[slot, :rank],
        up_bias=None if up is None else up[slot],
        residual=None if residual is None else residual[tokens],
        skip=None if skip is None else skip[tokens],
        scaling=None if scalings is None else scalings[slot : slot + 1],
        norm_weight=None,
        norm_bias=None,
        scale=1.0,
        add_input=call.add_input,
        activation=call.activation,
        compute_dtype=call.compute_dtype,
    )
