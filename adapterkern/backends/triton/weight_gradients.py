"""Weight, bias and scaling gradients, equations (10), (11), (13) and (14) of docs/math.md.

They are fixed-order partial sums over slices of the tokens, so that repeated runs give the same
bits.
"""

import triton
import triton.language as tl

from adapterkern.backends.triton.grouped_tiles import tokens_of
from adapterkern.backends.triton.tiles import load_rows, load_units, load_vector, scaled


@triton.jit
def sums_of_tokens(
    x_ptr, dy_ptr, dz_ptr, a_ptr, order_ptr, feature, unit, first, last,
    num_tokens, hidden_size, bottleneck_size, stride_x_token, stride_dy_token, stride_unit_token,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    DOWN: tl.constexpr, UP: tl.constexpr, DOWN_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz^T x and G^T = a^T dy, [BLOCK_R, BLOCK_H], over the rows `first` to `last` of dz and a; and
    what the column sums of dz and dy are made of, [BLOCK_T, BLOCK_R] and [BLOCK_T, BLOCK_H].

    order_ptr: the token of each row, whose x and dy are meant; None: rows are tokens. What is not
    asked for is zero.
    """
    d_down = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    # A dy that is converted is the second factor of G^T = a^T dy, which goes through shared memory;
    # as the first of G = dy^T a it would meet the fault that `awaited` is about.
    CONVERTED: tl.constexpr = dy_ptr.dtype.element_ty != DTYPE
    d_up = tl.zeros((BLOCK_R, BLOCK_H) if CONVERTED else (BLOCK_H, BLOCK_R), tl.float32)
    # The bias sums stay whole tiles until the end: a reduction across warps costs a barrier a step.
    dz_total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    dy_total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(first, last, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        if order_ptr is None:
            token, end = row, last
        else:
            token, end = tokens_of(order_ptr, row, last, num_tokens), num_tokens
        # Whatever lies in the padding of dz and a reaches units that are not stored; rows beyond
        # the slice are zero.
        if DOWN or DOWN_BIAS:
            dz = load_units(dz_ptr, row, unit, stride_unit_token, last, bottleneck_size, EVEN_R)
        if DOWN:
            x = load_rows(x_ptr, token, feature, stride_x_token, end, hidden_size, EVEN_H)
            d_down = tl.dot(tl.trans(dz), x.to(DTYPE), d_down, input_precision=PRECISION)
        if DOWN_BIAS:
            dz_total += dz.to(tl.float32)
        if UP or UP_BIAS:
            dy = load_rows(dy_ptr, token, feature, stride_dy_token, end, hidden_size, EVEN_H)
        if UP:
            a = load_units(a_ptr, row, unit, stride_unit_token, last, bottleneck_size, EVEN_R)
            if CONVERTED:
                d_up = tl.dot(tl.trans(a), dy.to(DTYPE), d_up, input_precision=PRECISION)
            else:
                d_up = tl.dot(tl.trans(dy), a, d_up, input_precision=PRECISION)
        if UP_BIAS:
            dy_total += dy.to(tl.float32)
    if not CONVERTED:
        d_up = tl.trans(d_up)
    return d_down, d_up, dz_total, dy_total


@triton.jit
def store_sums(
    d_down, d_up, dz_total, dy_total, scaling_ptr, scale,
    down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, index,
    feature, unit, feature_block, unit_block, hidden_size, bottleneck_size,
    CHANNEL_SCALING: tl.constexpr,
):  # fmt: skip
    """Store what `sums_of_tokens` found as number `index` of the outputs, dW_up and db_up scaled.
    The first feature block has the sum of dz, the first unit block that of dy."""
    in_features = feature < hidden_size
    in_units = unit < bottleneck_size
    in_both = in_units[:, None] & in_features[None, :]
    weight = index.to(tl.int64) * hidden_size * bottleneck_size
    if down_ptr is not None:
        offsets = weight + unit[:, None] * hidden_size + feature[None, :]
        tl.store(down_ptr + offsets, d_down.to(down_ptr.dtype.element_ty), mask=in_both)
    if up_ptr is not None:
        d_up = scaled(d_up, scaling_ptr, scale, feature[None, :], hidden_size, CHANNEL_SCALING)
        offsets = weight + feature[None, :] * bottleneck_size + unit[:, None]
        tl.store(up_ptr + offsets, d_up.to(up_ptr.dtype.element_ty), mask=in_both)
    if down_bias_ptr is not None:
        if feature_block == 0:
            total = tl.sum(dz_total, 0).to(down_bias_ptr.dtype.element_ty)
            tl.store(down_bias_ptr + index * bottleneck_size + unit, total, mask=in_units)
    if up_bias_ptr is not None:
        if unit_block == 0:
            total = tl.sum(dy_total, 0)
            total = scaled(total, scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING)
            total = total.to(up_bias_ptr.dtype.element_ty)
            tl.store(up_bias_ptr + index * hidden_size + feature, total, mask=in_features)


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "stride_unit_token"])
def bottleneck_bwd_dw_kernel(
    x_ptr, dy_ptr, dz_ptr, a_ptr,             # in: [T, H], [T, H], [T, R], [T, R]
    scaling_ptr, scale,                       # in: as above; neither where sums are still to add
    down_ptr, up_ptr,                         # out or None: [S, R, H], [S, H, R]
    down_bias_ptr, up_bias_ptr,               # out or None: [S, R], [S, H]
    num_tokens, hidden_size, bottleneck_size, tokens_per_split,
    stride_x_token, stride_dy_token, stride_unit_token,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr, R_MULTIPLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dW_down = dz^T x, G = dy^T a, and the column sums of dz and dy, over one slice of the tokens.

    Grid: feature blocks, unit blocks, splits. dW_up = scaling * G and db_up = scaling * sum(dy)
    get their scaling here if there is one split, else in `bottleneck_bwd_dw_sum_kernel`. HBM per
    token: read x and dy (H each), dz and a (R each, from L2 after the first feature block).
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    feature = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    unit = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    d_down, d_up, dz_total, dy_total = sums_of_tokens(
        x_ptr, dy_ptr, dz_ptr, a_ptr, None, feature, unit, first, last,
        num_tokens, hidden_size, bottleneck_size,
        stride_x_token, stride_dy_token, stride_unit_token, DTYPE, PRECISION,
        down_ptr is not None, up_ptr is not None,
        down_bias_ptr is not None, up_bias_ptr is not None,
        EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    store_sums(
        d_down, d_up, dz_total, dy_total, scaling_ptr, scale,
        down_ptr, up_ptr, down_bias_ptr, up_bias_ptr, split,
        feature, unit, tl.program_id(0), tl.program_id(1), hidden_size, bottleneck_size,
        CHANNEL_SCALING,
    )  # fmt: skip


@triton.jit
def sum_slices(part_ptr, offsets, mask, size, num_splits, BLOCK_S: tl.constexpr):
    """Sum the elements at `offsets`, [m, n], of S partial sums, which lie `size` elements apart:
    one BLOCK_S after another, each in an order that the compiler fixed (Triton 3.9 adds pairs).

    They are one load: ptxas leaves masked loads of an unrolled loop behind one another.
    """
    total = tl.zeros(offsets.shape, tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)[:, None, None]
        part_ptrs = part_ptr + (split.to(tl.int64) * size + offsets[None, :, :])
        total += tl.sum(
            tl.load(part_ptrs, mask=(split < num_splits) & mask[None, :, :], other=0.0), 0
        )
    return total


@triton.jit
def sum_vector_slices(part_ptr, index, mask, size, num_splits, BLOCK_S: tl.constexpr):
    """The same of a vector, as a column."""
    return tl.sum(sum_slices(part_ptr, index[:, None], mask[:, None], size, num_splits, BLOCK_S), 1)


@triton.jit
def sum_down(
    part_ptr, part_bias_ptr, d_ptr, d_bias_ptr, hidden_size, bottleneck_size, rank, num_splits,
    BLOCK_S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dW_down and db_down of one tile of units and features; zero from unit `rank` on."""
    feature_blocks = tl.cdiv(hidden_size, COLUMNS)
    unit = tl.program_id(0) // feature_blocks * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(0) % feature_blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_units = unit < bottleneck_size
    if part_ptr is not None:
        offsets = unit[:, None] * hidden_size + feature[None, :]
        mask = in_units[:, None] & (feature[None, :] < hidden_size)
        size = hidden_size * bottleneck_size
        summed = mask & (unit[:, None] < rank)
        total = sum_slices(part_ptr, offsets, summed, size, num_splits, BLOCK_S)
        tl.store(d_ptr + offsets, total.to(d_ptr.dtype.element_ty), mask=mask)
    if part_bias_ptr is not None:
        if tl.program_id(0) % feature_blocks == 0:
            total_dz = sum_vector_slices(
                part_bias_ptr, unit, in_units & (unit < rank), bottleneck_size, num_splits, BLOCK_S
            )
            tl.store(d_bias_ptr + unit, total_dz.to(d_bias_ptr.dtype.element_ty), mask=in_units)


@triton.jit
def sum_up(
    part_ptr, part_bias_ptr, up_weight_ptr, up_bias_ptr, scaling_ptr, scale,
    d_ptr, d_bias_ptr, d_scaling_ptr, hidden_size, bottleneck_size, rank, num_splits,
    CHANNEL_SCALING: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dW_up and db_up of one tile, or of all units of its features where d(scaling) is asked for.

    d(scaling)[h] = sum_r G[h, r] W_up[h, r] + b_up[h] sum_t dy[t, h], equation (13), needs a whole
    row of G. From unit `rank` on, W_up is not read and dW_up is zero; without units nor is b_up.
    """
    unit_blocks = tl.cdiv(bottleneck_size, BLOCK_R) if d_scaling_ptr is None else 1
    feature = tl.program_id(0) // unit_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_features = feature < hidden_size
    first = tl.program_id(0) % unit_blocks * BLOCK_R
    last = tl.minimum(first + BLOCK_R, bottleneck_size)
    if d_scaling_ptr is not None:  # dW_down may have many more tiles: the programs beyond H idle
        first, last = 0, tl.where(tl.program_id(0) * BLOCK_H < hidden_size, bottleneck_size, 0)
    d_scaling = tl.zeros((BLOCK_H,), tl.float32)
    if part_ptr is not None:
        for start in range(first, last, BLOCK_R):
            unit = start + tl.arange(0, BLOCK_R)
            mask = in_features[:, None] & (unit[None, :] < bottleneck_size)
            offsets = feature[:, None] * bottleneck_size + unit[None, :]
            size = hidden_size * bottleneck_size
            summed = mask & (unit[None, :] < rank)
            total = sum_slices(part_ptr, offsets, summed, size, num_splits, BLOCK_S)
            if d_scaling_ptr is not None:
                w_up = tl.load(up_weight_ptr + offsets, mask=summed, other=0.0).to(tl.float32)
                d_scaling += tl.sum(total * w_up, 1)
            if d_ptr is not None:
                total = scaled(
                    total, scaling_ptr, scale, feature[:, None], hidden_size, CHANNEL_SCALING
                )
                tl.store(d_ptr + offsets, total.to(d_ptr.dtype.element_ty), mask=mask)
    if part_bias_ptr is not None:
        if tl.program_id(0) % unit_blocks == 0:
            total_dy = sum_vector_slices(
                part_bias_ptr, feature, in_features, hidden_size, num_splits, BLOCK_S
            )
            biases = tl.where(rank > 0, hidden_size, 0)
            d_scaling += load_vector(up_bias_ptr, feature, biases) * total_dy
            if d_bias_ptr is not None:
                total_dy = scaled(
                    total_dy, scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING
                )
                tl.store(
                    d_bias_ptr + feature, total_dy.to(d_bias_ptr.dtype.element_ty), mask=in_features
                )
    if d_scaling_ptr is not None:
        tl.store(d_scaling_ptr + feature, d_scaling, mask=in_features)


@triton.jit(do_not_specialize=["bottleneck_size", "num_splits"])
def bottleneck_bwd_dw_sum_kernel(
    part_down_ptr, part_up_ptr,            # in or None: [S, R, H], [S, H, R]
    part_down_bias_ptr, part_up_bias_ptr,  # in or None: [S, R], [S, H]
    up_weight_ptr, up_bias_ptr,            # in: [H, R], [H]
    scaling_ptr, scale,                    # in: [1] or [H], or a float, or neither: 1
    d_down_ptr, d_up_ptr,                  # out or None: [R, H], [H, R]
    d_down_bias_ptr, d_up_bias_ptr,        # out or None: [R], [H]
    d_scaling_ptr,                         # out or None: [H] float32
    hidden_size, bottleneck_size, num_splits,
    CHANNEL_SCALING: tl.constexpr, R_MULTIPLE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums, as `sum_slices` orders them. Grid: tiles, 2 for the down- and the
    up-projection; a tile has eight of the rows of its matrix, whose elements lie side by side.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    if tl.program_id(1) == 0:
        sum_down(
            part_down_ptr, part_down_bias_ptr, d_down_ptr, d_down_bias_ptr,
            hidden_size, bottleneck_size, bottleneck_size, num_splits,
            BLOCK_S, 8, BLOCK_H * BLOCK_R // 8,
        )  # fmt: skip
    else:
        sum_up(
            part_up_ptr, part_up_bias_ptr, up_weight_ptr, up_bias_ptr, scaling_ptr, scale,
            d_up_ptr, d_up_bias_ptr, d_scaling_ptr, hidden_size, bottleneck_size, bottleneck_size,
            num_splits, CHANNEL_SCALING, BLOCK_S, BLOCK_H, BLOCK_R,
        )  # fmt: skip
