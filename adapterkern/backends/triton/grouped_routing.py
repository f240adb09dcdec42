"""The kernel that sorts tokens by adapter: `grouped.routing.sort_tokens` in one launch.

Every program counts all groups, from which it knows where those that are its own begin, and places
their tokens in order. No program waits for another and none adds to what another wrote, so the sort
is stable and its bits are always the same. The price is that each reads the ids twice, from L2:
8 T bytes, which is why many slots share programs.
"""

import triton
import triton.language as tl


@triton.jit
def group_of(ids_ptr, token, num_tokens, slots):
    """The group of each token: its slot, `slots` without one; `slots` + 1 where no token is."""
    slot = tl.load(ids_ptr + token, mask=token < num_tokens, other=-1)
    group = tl.where((slot < 0) | (slot >= slots), slots, slot)
    return tl.where(token < num_tokens, group, slots + 1)


@triton.jit
def store_tail(ptr, first, size, value, step, BLOCK: tl.constexpr):
    """Write a value to all places from `first` on, this program every `step`-th block."""
    for start in range(first + tl.program_id(0) * BLOCK, size, step):
        place = start + tl.arange(0, BLOCK)
        tl.store(ptr + place, tl.zeros((BLOCK,), tl.int32) + value, mask=place < size)


@triton.jit
def store_tiles(tiles_ptr, group, begin, count, slots, TILE: tl.constexpr):
    """The tiles of these groups, 64 of each at a time."""
    number = tl.where(group <= slots, (count + TILE - 1) // TILE, 0)
    for first in range(0, tl.max(number, 0), 64):
        tile = first + tl.arange(0, 64)[None, :]
        mask = tile < number[:, None]
        entry = tiles_ptr + 3 * (begin[:, None] // TILE + tile)
        before = tile * TILE
        tl.store(entry, group[:, None] + 0 * tile, mask=mask)
        tl.store(entry + 1, begin[:, None] + before, mask=mask)
        tl.store(entry + 2, tl.minimum(count[:, None] - before, TILE), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "slots", "max_tokens", "room", "max_tiles"])
def grouped_route_kernel(
    ids_ptr,                                  # in: [T]
    token_slots_ptr, order_ptr,               # out: [max_tokens], [room]
    tiles_ptr, slot_offsets_ptr,              # out: [max_tiles, 3], [S + 2]
    num_tokens, slots, max_tokens, room, max_tiles,
    TILE: tl.constexpr,
    BINS: tl.constexpr,                       # at least S + 2
    GROUPS: tl.constexpr,                     # of one program
    BLOCK: tl.constexpr,                      # tokens at a time
):  # fmt: skip
    """All four buffers, in full. Grid: S + 1 groups, the last of tokens without an adapter."""
    program, step = tl.program_id(0), tl.num_programs(0) * BLOCK
    bin = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        found = group_of(ids_ptr, token, num_tokens, slots)
        counts += tl.histogram(found, BINS)
        if program == 0:
            slot = tl.where(found < slots, found, -1)
            tl.store(token_slots_ptr + token, slot, mask=token < num_tokens)
    counts = tl.where(bin <= slots, counts, 0)
    filled = tl.where(bin < slots, (counts + TILE - 1) // TILE * TILE, counts)
    end = tl.sum(filled, 0)

    group = program * GROUPS + tl.arange(0, GROUPS)
    begin = tl.sum(tl.where(bin[None, :] < group[:, None], filled[None, :], 0), 1)
    count = tl.sum(tl.where(bin[None, :] == group[:, None], counts[None, :], 0), 1)
    place = begin
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        found = group_of(ids_ptr, token, num_tokens, slots)
        mine = (found[None, :] == group[:, None]) & (token[None, :] < num_tokens)
        ones = mine.to(tl.int32)
        behind = place[:, None] + tl.cumsum(ones, 1)
        tl.store(order_ptr + behind - 1, token[None, :] + 0 * behind, mask=mine)
        place += tl.sum(ones, 1)
    gap = place[:, None] + tl.arange(0, TILE)[None, :]  # up to the next group
    last = begin + (count + TILE - 1) // TILE * TILE
    tl.store(order_ptr + gap, 0 * gap - 1, mask=(gap < last[:, None]) & (group[:, None] < slots))
    store_tiles(tiles_ptr, group, begin, count, slots, TILE)
    tl.store(slot_offsets_ptr + group, begin, mask=group <= slots)
    if program == 0:
        tl.store(slot_offsets_ptr + slots + 1, end)

    store_tail(token_slots_ptr, num_tokens, max_tokens, -1, step, BLOCK)
    store_tail(order_ptr, end, room, -1, step, BLOCK)
    used = (end + TILE - 1) // TILE
    for start in range(used + program * BLOCK, max_tiles, step):
        tile = start + tl.arange(0, BLOCK)
        for column in tl.static_range(3):
            nothing = tl.zeros((BLOCK,), tl.int32) - (column == 0)
            tl.store(tiles_ptr + 3 * tile + column, nothing, mask=tile < max_tiles)
