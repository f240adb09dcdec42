"""Weight, bias and scaling gradients of many adapters, in an order that the routing alone fixes.

The rows of a routing are cut into chunks of one length, and those into segments, where one slot
ends and the next begins. As rows are sorted by slot, the segment of slot s in chunk c is the only
one with the number c + s: so there are num_chunks + S - 1 numbers, however the tokens are
distributed, the segments of a slot follow one another, and no program has more rows than a chunk.
"""

import triton
import triton.language as tl

from adapterkern.backends.triton.grouped_tiles import TILE, moved, rank_of, scale_of
from adapterkern.backends.triton.weight_gradients import (
    store_sums,
    sum_down,
    sum_up,
    sums_of_tokens,
)


@triton.jit
def slot_rows(slot_offsets_ptr, slot, num_rows):
    """Where the rows of a slot begin in `order`, and where they end."""
    first = tl.load(slot_offsets_ptr + slot)
    return first, tl.minimum(tl.load(slot_offsets_ptr + slot + 1), num_rows)


@triton.jit
def segment_of(
    slot_offsets_ptr, segment, slots, num_rows, chunk_rows, BLOCK_S: tl.constexpr = 256
):  # fmt: skip
    """The slot of a segment and its rows, from first to last; none where no slot has it."""
    slot = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int64)
    last = tl.zeros((), tl.int64)
    for start in range(0, slots, BLOCK_S):
        candidate = start + tl.arange(0, BLOCK_S)
        offset_ptrs = slot_offsets_ptr + candidate
        exists = candidate < slots
        chunk = (segment - candidate).to(tl.int64) * chunk_rows
        begin = tl.maximum(tl.load(offset_ptrs, mask=exists, other=0), chunk)
        end = tl.minimum(tl.load(offset_ptrs + 1, mask=exists, other=0), chunk + chunk_rows)
        end = tl.minimum(end, num_rows)
        found = begin < end
        slot += tl.sum(tl.where(found, candidate, 0))
        first += tl.sum(tl.where(found, begin, 0))
        last += tl.sum(tl.where(found, end, 0))
    return slot, first.to(tl.int32), last.to(tl.int32)


@triton.jit(
    do_not_specialize=["num_tokens", "slots", "num_rows", "bottleneck_size", "stride_unit_token"]
)
def grouped_bwd_dw_kernel(
    x_ptr, dy_ptr, dz_ptr, a_ptr,                # in: [T, H], [T, H], [rows, R], [rows, R]
    scalings_ptr, ranks_ptr,                     # in or None: [S], [S]
    order_ptr, tiles_ptr, slot_offsets_ptr,      # in: the routing's
    part_down_ptr, part_up_ptr,                  # out or None: [segments, R, H], [segments, H, R]
    part_down_bias_ptr, part_up_bias_ptr,        # out or None: [segments, R], [segments, H]
    d_down_ptr, d_up_ptr,                        # out or None: [S, R, H], [S, H, R]
    d_down_bias_ptr, d_up_bias_ptr,              # out or None: [S, R], [S, H]
    num_tokens, slots, num_rows, hidden_size, bottleneck_size, chunk_rows,
    stride_x_token, stride_dy_token, stride_unit_token,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_H: tl.constexpr, R_MULTIPLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The sums of `bottleneck_bwd_dw_kernel` over one segment. Grid: feature blocks of all
    segments, unit blocks.

    WHOLE: the only segment of a slot is its gradient at once; all others are partial sums, float32.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    feature_blocks = tl.cdiv(hidden_size, BLOCK_H)
    feature_block, unit_block = tl.program_id(0) % feature_blocks, tl.program_id(1)
    segment = tl.program_id(0) // feature_blocks
    slot, first, last = segment_of(slot_offsets_ptr, segment, slots, num_rows, chunk_rows)
    rank = rank_of(slot, ranks_ptr, slots, bottleneck_size)
    if (first >= last) | (rank <= 0):
        return
    feature = feature_block * BLOCK_H + tl.arange(0, BLOCK_H)
    unit = unit_block * BLOCK_R + tl.arange(0, BLOCK_R)
    # The last tile of a segment may be filled up.
    filled = last + tl.load(tiles_ptr + (last // TILE - 1) * 3 + 2) - TILE
    filled = tl.where(unit_block * BLOCK_R < rank, filled, first)
    d_down, d_up, dz_total, dy_total = sums_of_tokens(
        x_ptr, dy_ptr, dz_ptr, a_ptr, order_ptr, feature, unit, first, filled,
        num_tokens, hidden_size, rank, stride_x_token, stride_dy_token, stride_unit_token,
        DTYPE, PRECISION, part_down_ptr is not None, part_up_ptr is not None,
        part_down_bias_ptr is not None, part_up_bias_ptr is not None,
        EVEN_H, False, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    # Beyond the rank a is not zero, and zero is no product of a dz of zero and an x of Inf.
    d_down = tl.where(unit[:, None] < rank, d_down, 0.0)
    d_up = tl.where(unit[:, None] < rank, d_up, 0.0)
    begin, end = slot_rows(slot_offsets_ptr, slot, num_rows)
    if WHOLE and (begin == first) & (end == last):
        store_sums(
            d_down, d_up, dz_total, dy_total, None, scale_of(scalings_ptr, slot, True),
            d_down_ptr, d_up_ptr, d_down_bias_ptr, d_up_bias_ptr, slot,
            feature, unit, feature_block, unit_block, hidden_size, bottleneck_size, False,
        )  # fmt: skip
        return
    store_sums(
        d_down, d_up, dz_total, dy_total, None, None,
        part_down_ptr, part_up_ptr, part_down_bias_ptr, part_up_bias_ptr, segment,
        feature, unit, feature_block, unit_block, hidden_size, bottleneck_size, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "num_rows", "bottleneck_size"])
def grouped_bwd_dw_sum_kernel(
    part_down_ptr, part_up_ptr,            # in or None: [segments, R, H], [segments, H, R]
    part_down_bias_ptr, part_up_bias_ptr,  # in or None: [segments, R], [segments, H]
    up_weights_ptr, up_biases_ptr,         # in: [S, H, R], [S, H]
    scalings_ptr, ranks_ptr,               # in or None: [S], [S]
    slot_offsets_ptr,                      # in: the routing's
    d_down_ptr, d_up_ptr,                  # out or None: [S, R, H], [S, H, R]
    d_down_bias_ptr, d_up_bias_ptr,        # out or None: [S, R], [S, H]
    d_scaling_ptr,                         # out or None: [S, H] float32, of each feature
    slots, num_rows, hidden_size, bottleneck_size, chunk_rows,
    WHOLE: tl.constexpr, R_MULTIPLE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of each slot, and writes zeros for a slot without rows. Grid: as that
    of `bottleneck_bwd_dw_sum_kernel`, then slots."""
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    slot = tl.program_id(2)
    begin, end = slot_rows(slot_offsets_ptr, slot, num_rows)
    rank = rank_of(slot, ranks_ptr, slots, bottleneck_size)
    chunk = begin // chunk_rows
    count = tl.where((begin < end) & (rank > 0), (end - 1) // chunk_rows - chunk + 1, 0)
    if WHOLE and count == 1:
        return
    rank = tl.where(count > 0, rank, 0)
    weight, segment = hidden_size * bottleneck_size, chunk + slot
    if tl.program_id(1) == 0:
        sum_down(
            moved(part_down_ptr, segment, weight),
            moved(part_down_bias_ptr, segment, bottleneck_size),
            moved(d_down_ptr, slot, weight), moved(d_down_bias_ptr, slot, bottleneck_size),
            hidden_size, bottleneck_size, rank, count, BLOCK_S, 8, BLOCK_H * BLOCK_R // 8,
        )  # fmt: skip
    else:
        sum_up(
            moved(part_up_ptr, segment, weight), moved(part_up_bias_ptr, segment, hidden_size),
            moved(up_weights_ptr, slot, weight), moved(up_biases_ptr, slot, hidden_size),
            None, scale_of(scalings_ptr, slot, count > 0),
            moved(d_up_ptr, slot, weight), moved(d_up_bias_ptr, slot, hidden_size),
            moved(d_scaling_ptr, slot, hidden_size),
            hidden_size, bottleneck_size, rank, count, False, BLOCK_S, BLOCK_H, BLOCK_R,
        )  # fmt: skip
