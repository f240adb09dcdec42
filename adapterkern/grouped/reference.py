"""The semantic truth of many adapters: tokens gathered by slot, `adapterkern.reference` for each,
results scattered. docs/math.md, equation (24), numbers what is new.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adapterkern import _torch, reference
from adapterkern.grouped.call import GroupedCall, GroupedGradients, GroupedNeeds
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.spec import AdapterCall, has_values, shape_of


def forward(call: GroupedCall) -> tuple[Tensor, Tensor]:
    """y [..., H] and the pre-activation z [T, R], which is zero where there is none."""
    y = without_adapter(call)
    z = y.new_zeros((call.num_tokens, call.bottleneck_size), dtype=call.compute_dtype)
    with torch.no_grad(), reference.without_autocast(call.x):
        flat = y.view(-1, call.hidden_size)
        for slot, rank, tokens in groups(call):
            outputs, saved = reference.forward(of_slot(call, slot, rank, tokens))
            assert outputs.y is not None
            assert saved.z is not None
            flat[tokens] = outputs.y.to(y.dtype)
            z[tokens, :rank] = saved.z
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
            one = of_slot(call, slot, None, None)
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
        for slot, rank, tokens in groups(call):
            one = of_slot(call, slot, rank, tokens)
            saved = Saved(None if z is None else z[tokens, :rank])
            g = reference.backward(one, saved, Outputs(flat[tokens]), asked)
            if dx is not None and g.x is not None:
                dx[tokens] = g.x
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


def groups(call: GroupedCall) -> Iterator[tuple[int, int, Tensor]]:
    """The slots that tokens take: slot, rank above 0, tokens. The host waits for the device; on the
    meta device, where nothing tells them, there are none.
    """
    if call.slot_offsets.is_meta:
        return
    starts = call.slot_offsets.tolist()
    ranks = None if call.ranks is None else call.ranks.tolist()
    for slot in range(call.slots):
        rank = call.bottleneck_size if ranks is None else ranks[slot]
        tokens = call.order[starts[slot] : starts[slot + 1]]
        tokens = tokens[(tokens >= 0) & (tokens < call.num_tokens)].long()
        if rank > 0 and len(tokens) > 0:
            yield slot, rank, tokens


def of_slot(call: GroupedCall, slot: int, rank: int | None, tokens: Tensor | None) -> AdapterCall:
    """The call of one slot's adapter; None: of all units, on all tokens."""

    def of_tokens(tensor: Any) -> Any:  # torch.compile of torch 2.9 traces no union here
        if tensor is None or tokens is None:
            return tensor
        if not has_values(tensor):
            return tensor.new_empty((len(tokens), call.hidden_size, 0))
        return tensor.reshape(-1, call.hidden_size)[tokens]

    scalings, down, up = call.scalings, call.down_biases, call.up_biases
    return AdapterCall(
        x=of_tokens(call.x),
        down_weight=call.down_weights[slot, :rank],
        up_weight=call.up_weights[slot, :, :rank],
        down_bias=None if down is None else down[slot, :rank],
        up_bias=None if up is None else up[slot],
        residual=of_tokens(call.residual),
        skip=of_tokens(call.skip),
        scaling=None if scalings is None else scalings[slot : slot + 1],
        norm_weight=None,
        norm_bias=None,
        scale=1.0,
        add_input=call.add_input,
        activation=call.activation,
        compute_dtype=call.compute_dtype,
    )
