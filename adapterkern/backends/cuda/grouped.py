"""The forward of many adapters in the CUDA backend: what it declines, its plans and its launch.

Two forms. Tiles of the routing go through tensor cores, one slot each. Few tokens go by rows: each
reads its own adapter, in two kernels over slices of H.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkern.backends.base import empty_grouped_outputs, optional_rows, rows
from adapterkern.backends.cuda import launch_config
from adapterkern.backends.cuda.facts import PANEL, Device, Problem, RowBlockFacts
from adapterkern.backends.cuda.launch_config import (
    NO_SLICES,
    SLICE_FEATURES,
    Slices,
    block_memory,
    cdiv,
    slice_length,
)
from adapterkern.backends.cuda.params import (
    ACTIVATIONS,
    DTYPES,
    GROUPED_FORWARD,
    TFLOAT32,
    GroupedForwardParams,
    indices,
    view,
)
from adapterkern.grouped.call import TILE, GroupedCall, num_tiles
from adapterkern.spec import AdapterSpec

FEATURES = frozenset({"ranks"})  # and no "gradient": `declined` says why
# Blocks of the form of rows that an SM gets, so that each has some 32 KB of weights under way. A
# guess: 256 threads load four vectors of 16 bytes each at a time.
ROW_BLOCKS_PER_SM = 4
# A slice of the output fits the shared memory that a kernel has without asking for more.
MOST_SLICE_FEATURES = 8192


class GroupedPlan(NamedTuple):
    """Tiles, of which a launch has as many as T tokens can take; or else rows, with slices of H."""

    num_tiles: int = 0
    slices: Slices = NO_SLICES
    shared_bytes: int = 0  # of a block of tiles


def declined(spec: AdapterSpec) -> list[str]:
    """Why the kernels do not take a call of many adapters, beside what they do not declare."""
    if "gradient" not in spec.features:
        return []
    return [
        "the CUDA backend runs many adapters in inference alone; the Triton backend trains them.\n"
        "  hint: torch.no_grad() where no gradient is needed."
    ]


def tile_facts(problem: Problem) -> RowBlockFacts:
    """The narrowest shape of tiles that holds R."""
    fits = [
        fact
        for fact in launch_config.facts().grouped
        if fact.half == problem.half and problem.bottleneck_size <= fact.width
    ]
    return min(fits, key=lambda fact: fact.width)


@functools.lru_cache(maxsize=4096)
def grouped_plan(problem: Problem, slots: int, device: Device) -> GroupedPlan:
    """Rows for as many tokens as there are SMs: none then loads more than one adapter, which is
    the least that a block of tiles loads.
    """
    tokens, hidden, *_ = problem
    if tokens <= device.num_sms:
        wanted = cdiv(ROW_BLOCKS_PER_SM * device.num_sms, tokens)
        number = max(1, min(wanted, hidden // SLICE_FEATURES), cdiv(hidden, MOST_SLICE_FEATURES))
        length = slice_length(hidden, number, PANEL)
        return GroupedPlan(slices=Slices(cdiv(hidden, length), length))
    tiles, fact = num_tiles(tokens, slots), tile_facts(problem)
    # All have room at once as far as it goes, so that no last tile waits for the others.
    memory = block_memory(fact, problem.added, device, tiles * (TILE // fact.tokens))
    return GroupedPlan(tiles, shared_bytes=memory)


def forward(
    kernels: Any, recording: Any, call: GroupedCall, save: bool, tf32: bool, device: Device
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward; y, and z with `save`."""
    y, z = empty_grouped_outputs(call, save)
    num_tokens, half = call.num_tokens, call.compute_dtype != torch.float32
    added = [call.x if call.add_input else call.residual, call.skip]
    tiles = sum(2 if half and t.dtype == torch.float32 else 1 for t in added if t is not None)
    problem = Problem(num_tokens, call.hidden_size, call.bottleneck_size, half, tiles)
    plan = grouped_plan(problem, call.slots, device)
    partial = None
    if plan.num_tiles == 0:
        shape = plan.slices.number, num_tokens, call.bottleneck_size
        partial = call.x.new_empty(shape, dtype=torch.float32)
    for tensor in (y, z, partial):
        recording.own(tensor)
    # Copies made here stay bound to a name until the launch: addresses keep nothing alive.
    inputs = {
        "x": rows(call.x),
        "down_weights": _stacked(call.down_weights),
        "up_weights": _stacked(call.up_weights),
        "down_biases": _stacked(call.down_biases),
        "up_biases": _stacked(call.up_biases),
        "residual": optional_rows(call.residual),
        "skip": optional_rows(call.skip),
        "scalings": _stacked(call.scalings),
    }
    integers = {"ranks": _stacked(call.ranks)}
    integers |= {name: getattr(call, name) for name in ("token_slots", "order", "tiles")}
    outputs = {"y": y, "z": z, "partial": partial}
    down, up = inputs["down_weights"], inputs["up_weights"]
    assert down is not None
    assert up is not None
    params = GroupedForwardParams(
        num_tokens=num_tokens,
        hidden_size=call.hidden_size,
        bottleneck_size=call.bottleneck_size,
        slots=call.slots,
        **{name: view(tensor) for name, tensor in (inputs | outputs).items()},
        **{name: indices(tensor) for name, tensor in integers.items()},
        down_slot_stride=down.stride(0),
        up_slot_stride=up.stride(0),
        num_tiles=plan.num_tiles,
        num_splits=plan.slices.number,
        features_per_split=plan.slices.length,
        shared_bytes=plan.shared_bytes,
        activation=ACTIVATIONS[call.activation],
        compute_dtype=TFLOAT32 if tf32 else DTYPES[call.compute_dtype],
        add_input=call.add_input,
    )
    recording.launch(kernels.grouped_forward, GROUPED_FORWARD, params, call.x.device)
    return y, z


def _stacked(tensor: Tensor | None) -> Tensor | None:
    """A tensor of all slots whose rows have no gaps within: itself, or a copy."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()
