"""Tile helpers shared by the forward and backward kernels.

A tile of activations is [BLOCK_T, width] of a tensor with contiguous rows, a row stride apart.
Token offsets are int64, because T * H passes 2^31 in real batches and a view such as
hidden[:, -1] has row strides beyond 2^24; weight offsets fit int32.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, token, column, stride_token, num_tokens, num_columns, EVEN: tl.constexpr):
    """Load [BLOCK_T, width] of a [T, width] tensor; zeros out of bounds. EVEN: no column mask."""
    offsets = token[:, None].to(tl.int64) * stride_token + column[None, :]
    mask = token[:, None] < num_tokens
    if not EVEN:
        mask = mask & (column[None, :] < num_columns)
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr, tile, token, column, stride_token, num_tokens, num_columns,
    EVEN: tl.constexpr, KEEP: tl.constexpr = False,
):  # fmt: skip
    """The inverse of `load_rows`; converts to the tensor's dtype.

    The lines of y and dx are marked as the first to leave L2 (.cs): nothing reads them soon, and
    the second loop of a row block does read what they would push out. KEEP: the same program reads
    these again.
    """
    offsets = token[:, None].to(tl.int64) * stride_token + column[None, :]
    mask = token[:, None] < num_tokens
    if not EVEN:
        mask = mask & (column[None, :] < num_columns)
    POLICY: tl.constexpr = "" if KEEP else ".cs"
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask, cache_modifier=POLICY)


@triton.jit
def unit_offsets(
    token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R: tl.constexpr
):  # fmt: skip
    """Offsets and mask of [BLOCK_T, BLOCK_R] in z, dz, a or a partial sum, all [T, R].

    Their rows begin at multiples of 8 elements (`base.empty_units`), whatever R is, and the mask
    ends at the next multiple of 8: so these tiles move in vectors of 16 bytes. The elements between
    R and there belong to no unit. Who sums over units puts them out, or reads the a or the dz of a
    kernel that stored zeros there.
    """
    stride_unit_token = stride_unit_token // 8 * 8  # no change: it shows the compiler the vectors
    mask = token[:, None] < num_tokens
    if not EVEN_R:
        mask = mask & (unit[None, :] < (bottleneck_size + 7) // 8 * 8)
    return token[:, None].to(tl.int64) * stride_unit_token + unit[None, :], mask


@triton.jit
def load_units(
    ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R: tl.constexpr
):  # fmt: skip
    """Load a tile of z, dz or a; zeros out of bounds but for the row's padding."""
    offsets, mask = unit_offsets(
        token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
    )
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def store_units(
    ptr, tile, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R: tl.constexpr
):  # fmt: skip
    """The inverse of `load_units`; converts to the tensor's dtype."""
    offsets, mask = unit_offsets(
        token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
    )
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def existing_units(tile, unit, bottleneck_size, EVEN_R: tl.constexpr):
    """Zero the columns of the units that only fill up a tile.

    Those of the weights are zero too, but Inf or NaN times zero is NaN, and would spoil a row that
    eager keeps finite: in x or dy, and in the padding of a row.
    """
    if not EVEN_R:
        tile = tl.where(unit[None, :] < bottleneck_size, tile, 0.0)
    return tile


@triton.jit
def awaited(product):
    """The same numbers; the addition keeps the product from running into a loop's next step.

    On Hopper a first factor that was converted is read from registers while the product runs, and
    ptxas before 13.3 lets the next step write them meanwhile (triton-lang/triton#9433).
    """
    return product + 0.0


@triton.jit
def plus_product(total, a, b, PRECISION: tl.constexpr):
    """total + a b over one tile of units.

    In full float32 precision each tile is summed by itself: one chain of additions over a wide
    bottleneck rounds more than twice as much as the blocks that a library sums.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        total += tl.dot(a, b, input_precision=PRECISION)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def sum_partials(
    partial_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, num_splits,
    EVEN_R: tl.constexpr, SUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sum a tile of the [S, T, R] float32 partial products in the order of the splits."""
    offsets, mask = unit_offsets(
        token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
    )
    step = num_tokens.to(tl.int64) * (stride_unit_token // 8 * 8)
    total = tl.zeros(offsets.shape, tl.float32)
    for _ in tl.range(0, num_splits, num_stages=SUM_STAGES):
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        offsets += step
    return total


@triton.jit
def load_down_tile(
    ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R: tl.constexpr, EVEN_H: tl.constexpr
):  # fmt: skip
    """Load [BLOCK_R, BLOCK_H] of W_down [R, H]; zeros out of bounds."""
    offsets = unit[:, None] * hidden_size + feature[None, :]
    if EVEN_R and EVEN_H:
        tile = tl.load(ptr + offsets)
    else:
        mask = (unit[:, None] < bottleneck_size) & (feature[None, :] < hidden_size)
        tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    return tile


@triton.jit
def load_up_tile(
    ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R: tl.constexpr, EVEN_H: tl.constexpr,
    stride_feature=None,
):  # fmt: skip
    """Load [BLOCK_H, BLOCK_R] of W_up [H, R], whose rows are `stride_feature` elements apart if not
    R; zeros out of bounds."""
    stride = bottleneck_size if stride_feature is None else stride_feature
    offsets = feature[:, None] * stride + unit[None, :]
    if EVEN_R and EVEN_H:
        tile = tl.load(ptr + offsets)
    else:
        mask = (feature[:, None] < hidden_size) & (unit[None, :] < bottleneck_size)
        tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    return tile


@triton.jit
def load_vector(ptr, index, size):
    """Load a bias as a float32 vector; zeros without a bias and out of bounds."""
    vector = tl.zeros(index.shape, tl.float32)
    if ptr is not None:
        vector += tl.load(ptr + index, mask=index < size, other=0.0).to(tl.float32)
    return vector


@triton.jit
def scaled(tile, scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING: tl.constexpr):
    """scaling * tile in float32: by a learned [H], a learned [1], or a float; the tile itself where
    there is none of them, which is a scaling of 1. `feature` broadcasts against the tile.
    """
    if CHANNEL_SCALING:
        mask = feature < hidden_size
        vector = tl.load(scaling_ptr + feature, mask=mask, other=0.0).to(tl.float32)
        tile = tile.to(tl.float32) * vector
    elif scaling_ptr is not None:
        tile = tile.to(tl.float32) * tl.load(scaling_ptr).to(tl.float32)
    elif scale is not None:
        tile = tile.to(tl.float32) * scale
    return tile
