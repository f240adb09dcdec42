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
def store_rows(ptr, tile, token, column, stride_token, num_tokens, num_columns, EVEN: tl.constexpr):
    """The inverse of `load_rows`; converts to the tensor's dtype."""
    offsets = token[:, None].to(tl.int64) * stride_token + column[None, :]
    mask = token[:, None] < num_tokens
    if not EVEN:
        mask = mask & (column[None, :] < num_columns)
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(
    ptr, row, column, num_rows, num_columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr
):
    """Load elements [row, column] of a contiguous [num_rows, num_columns] weight, or zeros out of
    bounds.

    The caller chooses which of `row` and `column` runs down the tile, because they are broadcast
    against each other: a transposed tile differs only in the order of its addresses.
    """
    offsets = row * num_columns + column
    if EVEN_ROWS and EVEN_COLUMNS:
        tile = tl.load(ptr + offsets)
    else:
        tile = tl.load(ptr + offsets, mask=(row < num_rows) & (column < num_columns), other=0.0)
    return tile


@triton.jit
def load_vector(ptr, index, size):
    """Load a bias as a float32 vector; zeros without a bias and out of bounds."""
    vector = tl.zeros(index.shape, tl.float32)
    if ptr is not None:
        vector += tl.load(ptr + index, mask=index < size, other=0.0).to(tl.float32)
    return vector


@triton.jit
def load_scaling(scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING: tl.constexpr):
    """The float32 scaling of each feature: a float, a learned [1], or a learned [H]."""
    scaling = tl.zeros(feature.shape, tl.float32)
    if scaling_ptr is None:
        scaling += scale
    elif CHANNEL_SCALING:
        scaling += tl.load(scaling_ptr + feature, mask=feature < hidden_size, other=0.0).to(
            tl.float32
        )
    else:
        scaling += tl.load(scaling_ptr).to(tl.float32)
    return scaling


@triton.jit
def sum_partials(
    partial_ptr, token, unit, num_tokens, bottleneck_size, num_splits, EVEN_R: tl.constexpr
):
    """Sum a tile of the [S, T, R] float32 partial products in the order of the splits."""
    total = load_rows(
        partial_ptr, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R
    )
    for _ in range(1, num_splits):
        partial_ptr += num_tokens.to(tl.int64) * bottleneck_size
        total += load_rows(
            partial_ptr, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R
        )
    return total
