"""Calls of many adapters with NaN wherever nothing may be read, and their gradients by the rule of
`adapterkern.parity`."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterkern.backends import get
from adapterkern.grouped import reference
from adapterkern.grouped.call import (
    TENSOR_NAMES,
    TILE,
    GroupedCall,
    GroupedGradients,
    GroupedNeeds,
    make_grouped_call,
)
from adapterkern.grouped.routing import sort_tokens
from adapterkern.parity import judge

ALL = GroupedNeeds(*[name not in ("residual", "skip") for name in GroupedNeeds._fields])
NAN = float("nan")


@dataclass(frozen=True)
class Sizes:
    """ids: the slot of each token. ranks: of each slot; None: all have R units."""

    ids: list[int]
    hidden: int
    bottleneck: int
    slots: int
    ranks: list[int] | None = None
    dtype: torch.dtype = torch.float32
    weights: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)


def draw(sizes: Sizes, seed: int = 0) -> tuple[GroupedCall, Tensor]:
    """A call and dy. NaN: units beyond a slot's rank, and all of a slot that no token takes."""
    generator = torch.Generator().manual_seed(seed)
    tokens, hidden, bottleneck, slots = (
        len(sizes.ids), sizes.hidden, sizes.bottleneck, sizes.slots,
    )  # fmt: skip

    def normal(*shape: int, dtype: torch.dtype = sizes.dtype, by: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * by).to(dtype)

    of_weights = sizes.weights or sizes.dtype
    down = normal(slots, bottleneck, hidden, dtype=of_weights, by=hidden**-0.5)
    up = normal(slots, hidden, bottleneck, dtype=of_weights, by=bottleneck**-0.5)
    down_biases = normal(slots, bottleneck, dtype=of_weights)
    up_biases = normal(slots, hidden, dtype=of_weights)
    scalings = torch.rand(slots, generator=generator) + 0.5
    ranks = sizes.ranks or [bottleneck] * slots
    for slot, rank in enumerate(ranks):
        rank = rank if slot in sizes.ids else 0
        down[slot, rank:], up[slot, :, rank:], down_biases[slot, rank:] = NAN, NAN, NAN
        if rank == 0:
            up_biases[slot], scalings[slot] = NAN, NAN
    given = {
        "down_biases": down_biases,
        "up_biases": up_biases,
        "residual": "input",
        "skip": None,
        "scalings": scalings,
        "ranks": None if sizes.ranks is None else torch.tensor(ranks, dtype=torch.int32),
        "activation": "gelu",
        "gradient": True,
    } | sizes.options
    max_tokens = given.pop("max_tokens", tokens)
    # Tokens that x does not have take no adapter.
    routing = buffers(sizes.ids + [-1] * (max_tokens - tokens), slots)
    x = normal(tokens, hidden)
    call = make_grouped_call(x, down, up, routing=routing, **given)
    return call, normal(tokens, hidden, dtype=call.output_dtype)


def buffers(ids: list[int], slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of an `AdapterRouting`, filled without a kernel."""
    room = len(ids) + slots * (TILE - 1)
    shapes = (len(ids),), (room,), (-(-room // TILE), 3), (slots + 2,)
    made = tuple(torch.empty(shape, dtype=torch.int32) for shape in shapes)
    sort_tokens(torch.tensor(ids, dtype=torch.int32), slots, *made)
    return made


def in_dtype(call: GroupedCall, dtype: torch.dtype) -> GroupedCall:
    """The call in another dtype, with what the products take rounded to their own first."""
    changed = {}
    for name in TENSOR_NAMES:
        tensor = getattr(call, name)
        if tensor is None or not tensor.dtype.is_floating_point:
            continue
        rounded = tensor.to(call.compute_dtype) if "weights" in name else tensor
        wide = torch.promote_types(dtype, torch.float32) if name == "scalings" else dtype
        changed[name] = rounded.to(wide).contiguous()
    return call._replace(compute_dtype=dtype, **changed)


def given_needs(call: GroupedCall, needs: GroupedNeeds) -> GroupedNeeds:
    """Those of the tensors that the call has, as autograd asks for them."""
    asked = needs._asdict()
    return GroupedNeeds(**{n: asked[n] and getattr(call, n) is not None for n in asked})


def reference_gradients(
    call: GroupedCall, dy: Tensor, needs: GroupedNeeds, dtype: torch.dtype | None = None
) -> GroupedGradients:
    """Of the reference, in the call's own types or in another."""
    needs = given_needs(call, needs)
    if dtype is not None:
        call, dy = in_dtype(call, dtype), dy.to(dtype)
    _, z = reference.forward(call)
    return reference.backward(call.for_backward(needs), z, dy.contiguous(), needs)


def triton_gradients(
    call: GroupedCall, dy: Tensor, needs: GroupedNeeds = ALL, z: Tensor | None = None
) -> GroupedGradients:
    """Of the kernels, from the z of the reference."""
    needs = given_needs(call, needs)
    if z is None:
        _, z = reference.forward(call)
    return get("triton").grouped_backward(call.for_backward(needs), z, dy, needs)


def check(call: GroupedCall, dy: Tensor, needs: GroupedNeeds = ALL) -> GroupedGradients:
    """The gradients of the kernels, each judged; those not asked for are None, and what no token
    took is exactly zero."""
    found = triton_gradients(call, dy, needs)
    oracle = reference_gradients(call, dy, needs, torch.float64)
    eager = reference_gradients(call, dy, needs)
    given = call.tensors()
    for name, out, exact, plain in zip(GroupedNeeds._fields, found, oracle, eager, strict=True):
        if not getattr(needs, name) or given[name] is None:
            assert out is None, name
            continue
        assert (out.dtype, out.shape) == (given[name].dtype, given[name].shape), name
        assert plain.dtype == out.dtype
        # Of a few numbers the error of eager is luck: at least one rounding of what they sum up.
        stored = call.compute_dtype if name == "scalings" else out.dtype
        error, tolerance = judge(name, out, exact, [plain], stored)
        assert error <= tolerance, f"{name}: {error} > {tolerance}"
        assert not out[exact == 0].any() or name == "x", name
    return found


def subsets() -> list[GroupedNeeds]:
    """Each gradient alone, and every two of them."""
    names = [name for name, is_asked in ALL._asdict().items() if is_asked]
    picks = itertools.combinations_with_replacement(names, 2)
    return [GroupedNeeds(**dict.fromkeys(pick, True)) for pick in picks]


def same_bits(one: GroupedGradients, other: GroupedGradients) -> bool:
    """Whether all gradients agree bit for bit."""
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )
