"""The launches of the forward of many adapters, and of their routing: plans and arguments.

The plans are pure functions of sizes, like those of `launch_config`. None has been measured.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from adapterkern.backends.base import (
    allow_tf32,
    empty_units,
    optional_rows,
    packed,
    unit_stride,
)
from adapterkern.backends.triton import grouped_forward as fwd
from adapterkern.backends.triton import grouped_routing, launcher
from adapterkern.backends.triton.activations import VALUES
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
    cdiv,
    into_stages,
    out_stages,
    row_blocks,
)
from adapterkern.backends.triton.launches import TYPES, dtypes_of, stride_of, tiles_of, units_of
from adapterkern.grouped.call import TILE, GroupedCall, num_tiles

# By row, every token reads the weights of its adapter, whoever else does; a tile reads them once,
# but takes H / 64 steps for each product. With this many units of all tokens together, reading
# takes about as long as those steps: an estimate from the bandwidth and the latency of an H100.
MOST_UNITS_BY_ROW = 4096
FEWEST_TOKENS_OF_TILES = 17  # as many as fill the shortest tile are too few for most of the SMs
LEAST_ROW_ELEMENTS = 4096  # of a weight in a program by row: 4 loads of 16 bytes a lane
MOST_SPLITS_BY_ROW = 16  # whose sums each program of the second half adds up

# Comparisons of a token with a group in one step of a routing: 16 a lane.
ROUTED_AT_A_TIME = 4096
# The bins that all groups of a program are compared with: Triton 3.6 has no registers for more.
MOST_BINS_OF_GROUPS = 512


def grouped_problem(call: GroupedCall, device: Device) -> Problem:
    """The problem that a forward is planned for; wide as that of one adapter is."""
    single = call.compute_dtype == torch.float32
    weights = call.down_weights.dtype, call.up_weights.dtype
    return Problem(
        num_tokens=call.num_tokens,
        hidden_size=call.hidden_size,
        bottleneck_size=call.bottleneck_size,
        ieee=single and not allow_tf32(),
        wide=call.x.dtype == torch.float32 or (device.small and torch.float32 in weights),
    )


@functools.lru_cache(maxsize=4096)
def forward_plan(problem: Problem, device: Device) -> RowBlock | Split:
    """By row (a `Split` of blocks of one token) or tiled, by the sizes alone."""
    tokens, _, bottleneck = problem[:3]
    if tokens < FEWEST_TOKENS_OF_TILES or tokens * bottleneck <= MOST_UNITS_BY_ROW:
        return by_row(problem, device)
    return RowBlock(tiled(problem, device))


def by_row(problem: Problem, device: Device) -> Split:
    """Tiles of a weight as large as leave every SM two programs, and slices of H for about four
    programs of the first half an SM: one token's weights lie side by side in many SMs.
    """
    tokens, hidden, bottleneck = problem[:3]
    block_r = min(max(16, triton.next_power_of_2(bottleneck)), 128)
    unit_blocks = cdiv(bottleneck, block_r)

    def tile(rows: int, most: int) -> LaunchConfig:
        """Of `rows` programs a tile of features, and `most` elements."""
        elements = most
        while elements > LEAST_ROW_ELEMENTS and (
            rows * cdiv(hidden * block_r, elements) < 2 * device.num_sms
        ):
            elements //= 2
        return LaunchConfig(1, elements // block_r, block_r, 4, 1)

    # Odd rows come in single elements, whose addresses take registers.
    narrow = tile(tokens * unit_blocks, 8192)
    widen = tile(tokens, 16384 if problem.plain else LEAST_ROW_ELEMENTS)
    blocks = cdiv(hidden, narrow.block_h)
    wanted = max(1, 4 * device.num_sms // (tokens * unit_blocks))
    each = cdiv(blocks, min(wanted, blocks, MOST_SPLITS_BY_ROW)) * narrow.block_h
    return Split(narrow, widen, cdiv(hidden, each), each, widen.block_h)


def tiled(problem: Problem, device: Device) -> LaunchConfig:
    """The tallest row block within a tile of the routing that gives most SMs one, else the
    shortest: no second form waits for fewer tokens.
    """
    widest = 64 if problem.ieee else 128  # tile of units; gathered rows leave fewer registers
    one_tile = problem._replace(bottleneck_size=min(problem.bottleneck_size, widest))
    tall = row_blocks(one_tile, device)[0]
    config = replace(tall, block_t=min(tall.block_t, TILE))
    if problem.bottleneck_size > config.block_r:  # z and a of a tile beside u: for registers
        config = replace(config, num_warps=8, blocks_per_sm=1)
    while config.block_t > 16 and 4 * cdiv(problem.num_tokens, config.block_t) < 3 * device.num_sms:
        wider = problem.plain and config.block_r < 128  # as many elements in flight
        block_h = 128 if wider else config.block_h
        config = replace(config, block_t=config.block_t // 2, block_h=block_h)
    return config


class GroupedForward:
    """The launches of one forward on one device, which `recording` runs and notes."""

    def __init__(self, call: GroupedCall, recording: launcher.Launches, device: Device) -> None:
        self._call, self._device = call, device
        self._launch, self._own = recording.launch, recording.own
        self._residual, self._skip = optional_rows(call.residual), optional_rows(call.skip)
        self._ranks = packed(call.ranks)

    def tiled(self, x: Tensor, y: Tensor, z: Tensor | None, config: LaunchConfig) -> None:
        call, sizes = self._call, self._sizes(x)
        one_tile = call.bottleneck_size <= config.block_r
        a = None if one_tile else self._own(empty_units(call, call.num_tokens))
        added = x if call.add_input else self._residual, self._skip
        row_bytes = sum(tensor.element_size() for tensor in added if tensor is not None)
        down, up = call.down_weights.contiguous(), call.up_weights.contiguous()
        stages = into_stages(config, self._device, x.element_size(), down.element_size())
        tiles = tiles_of(call, config, stages)
        tiles["EVEN_R"] = tiles["EVEN_R"] and call.ranks is None
        # The loop for ragged ranks writes its tile of the weight once more.
        again = config.block_r * config.block_h * call.compute_dtype.itemsize
        device = self._device
        room = replace(device, shared_memory=device.shared_memory - config.blocks_per_sm * again)
        self._launch(
            fwd.grouped_fwd_kernel,
            (num_tiles(call.num_tokens, call.slots) * (TILE // config.block_t),),
            x, down, up, packed(call.down_biases), packed(call.up_biases),
            self._residual, self._skip, packed(call.scalings), self._ranks,
            call.order, call.tiles, y, z, a, *sizes,
            ONE_TILE=one_tile,
            OUT_STAGES=out_stages(config, room, row_bytes, up.element_size(), y.element_size()),
            **self._options(), **dtypes_of(call), **tiles,
        )  # fmt: skip

    def by_row(self, x: Tensor, y: Tensor, z: Tensor | None, plan: Split) -> None:
        call = self._call
        tokens, slots, hidden, bottleneck, *strides = self._sizes(x)
        stride_x, _, _, stride_unit = strides
        partial = self._own(empty_units(call, plan.num_splits, tokens, dtype=torch.float32))
        grid = tokens, cdiv(bottleneck, plan.narrow.block_r), plan.num_splits
        self._launch(
            fwd.grouped_fwd_row_down_kernel, grid,
            x, packed(call.down_weights), self._ranks, call.token_slots, partial,
            tokens, slots, hidden, bottleneck, plan.features_per_split, stride_x, stride_unit,
            **self._row_tiles(plan.narrow),
        )  # fmt: skip
        self._launch(
            fwd.grouped_fwd_row_up_kernel, (tokens, cdiv(hidden, plan.widen.block_h)),
            partial, x, packed(call.up_weights), packed(call.down_biases), packed(call.up_biases),
            self._residual, self._skip, packed(call.scalings), self._ranks, call.token_slots, y, z,
            tokens, slots, hidden, bottleneck, *strides,
            NUM_SPLITS=plan.num_splits, **self._options(), **self._row_tiles(plan.widen),
        )  # fmt: skip

    def _row_tiles(self, config: LaunchConfig) -> dict[str, Any]:
        return {
            "DTYPE": TYPES[self._call.compute_dtype],
            "EVEN_H": self._call.hidden_size % config.block_h == 0,
            "BLOCK_H": config.block_h,
            "BLOCK_R": config.block_r,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def _sizes(self, x: Tensor) -> tuple[int, ...]:
        call = self._call
        return (
            call.num_tokens, call.slots, call.hidden_size, call.bottleneck_size,
            x.stride(0), stride_of(self._residual), stride_of(self._skip), unit_stride(call),
        )  # fmt: skip

    def _options(self) -> dict[str, Any]:
        call = self._call
        return {
            "ACTIVATION": VALUES[call.activation],
            "ADD_INPUT": call.add_input,
            **units_of(call),
        }


def route(ids: Tensor, buffers: tuple[Tensor, ...], recording: launcher.Launches) -> None:
    """Fill the buffers of a routing for ids [T]."""
    token_slots, order, tiles, slot_offsets = buffers
    tokens, slots = len(ids), len(slot_offsets) - 2
    bins = max(256, triton.next_power_of_2(slots + 2))
    groups = 16 if tokens <= 256 else 1 if slots < 128 else 4
    groups = max(1, min(groups, MOST_BINS_OF_GROUPS // bins))
    recording.launch(
        grouped_routing.grouped_route_kernel, (cdiv(slots + 1, groups),),
        ids, token_slots, order, tiles, slot_offsets,
        tokens, slots, len(token_slots), len(order), len(tiles),
        TILE=TILE, BINS=bins, GROUPS=groups, BLOCK=ROUTED_AT_A_TIME // groups, num_warps=8,
    )  # fmt: skip
