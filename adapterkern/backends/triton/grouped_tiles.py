"""What the kernels of many adapters read of a routing (`adapterkern.AdapterRouting`): the slot of a
row block, its tokens and its units.
"""

import triton
import triton.language as tl

from adapterkern.grouped.call import TILE as _TILE

TILE = tl.constexpr(_TILE)


@triton.jit
def row_block_of(tiles_ptr, block, BLOCK_T: tl.constexpr):
    """The slot of a row block (the number of slots: no adapter; -1: no token is left for it), its
    rows in `order` [BLOCK_T], and the end of its tile's rows there. A tile has TILE // BLOCK_T row
    blocks."""
    BLOCKS: tl.constexpr = TILE // BLOCK_T
    tile_ptr = tiles_ptr + block // BLOCKS * 3
    start = tl.load(tile_ptr + 1)
    first = start + block % BLOCKS * BLOCK_T
    last = start + tl.load(tile_ptr + 2)
    slot = tl.where(first < last, tl.load(tile_ptr), -1)
    return slot, first + tl.arange(0, BLOCK_T), last


@triton.jit
def tokens_of(order_ptr, row, last, num_tokens):
    """The tokens of rows of `order`; num_tokens, which every load and store masks, as it does what
    is beyond, where a row is not before `last`."""
    token = tl.load(order_ptr + row, mask=row < last, other=-1)
    return tl.where(token < 0, num_tokens, token)


@triton.jit
def rank_of(slot, ranks_ptr, slots, bottleneck_size):
    """The units of a slot; 0 where there is no adapter, so that nothing of one is read."""
    exists = (slot >= 0) & (slot < slots)
    if ranks_ptr is None:
        rank = tl.where(exists, bottleneck_size, 0)
    else:
        # No mask: the interpreter of Triton 3.9 takes none with one truth value in it.
        rank = tl.load(ranks_ptr + tl.where(exists, slot, 0))
        rank = tl.where(exists, tl.maximum(tl.minimum(rank, bottleneck_size), 0), 0)
    return rank


@triton.jit
def moved(ptr, slot, elements):
    """The pointer to a slot, `elements` long each; nothing of an absent tensor: Triton 3.6 returns
    no None by its name."""
    if ptr is not None:
        return ptr + slot.to(tl.int64) * elements


@triton.jit
def scale_of(scalings_ptr, slot, exists):
    """The scaling of a slot that exists, else 0; nothing, as `scaled` takes it, without any."""
    if scalings_ptr is not None:
        return tl.where(exists, tl.load(scalings_ptr + tl.where(exists, slot, 0)), 0.0)
