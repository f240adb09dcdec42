"""Forward kernels of a norm behind the adapter, equations (16) to (18) and (23) of docs/math.md.

- row block: the program that computes the sum of its tokens also normalises it. The rounded sum
  waits in L2 for its statistics, instead of being computed twice.
- rows: a kernel of its own behind the forward's, for rows that L2 would not keep, and for the split
  form.

The sum waits in `stream_ptr`: the y that the call returns, or else the memory of `normed` itself,
whose rows the same program then overwrites.
"""

import triton
import triton.language as tl

from adapterkern.backends.triton.forward import (
    output_tile,
    row_block_bottleneck,
    up_bias_product,
)
from adapterkern.backends.triton.tiles import load_rows, load_up_tile, load_vector, store_rows


@triton.jit
def merged_statistics(
    mean, squares, s, step, hidden_size,
    LAYER: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The mean and M2 of each element of the tile, [BLOCK_T, BLOCK_H], after one more tile s, by
    Chan's rule, equation (23); of an RMSNorm the sum of squares. Tiles come from the last features
    to the first, so that the first one alone, step 0, may lack some: they are zeros there.

    No sum of squares is subtracted from another, so a mean far from zero cancels nothing; and no
    step reduces, which would be a barrier or two.
    """
    if LAYER:
        delta = s - mean
        if EVEN_H:
            mean += delta * (1.0 / (step + 1))
        else:
            count = tl.maximum(present_in(step + 1, hidden_size, BLOCK_H), 1.0)
            mean += delta * (1.0 / count)[None, :]
        squares += delta * (s - mean)
    else:
        squares += s * s
    return mean, squares


@triton.jit
def present_in(steps, hidden_size, BLOCK_H: tl.constexpr):
    """How many features each column of the tile has met in so many steps, [BLOCK_H] float32."""
    last = (tl.cdiv(hidden_size, BLOCK_H) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
    return (steps - (last >= hidden_size).to(tl.int32)).to(tl.float32)


@triton.jit
def stored_statistics(
    mean, squares, token, mean_ptr, rstd_ptr, num_tokens, hidden_size,
    LAYER: tl.constexpr, EPS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The mean and rstd of rows, [BLOCK_T], equations (16) and (17), of what `merged_statistics`
    leaves: the columns are merged by the same rule. They are stored where asked for."""
    row_mean = tl.sum(mean, 1)
    if LAYER:
        count = present_in(tl.cdiv(hidden_size, BLOCK_H), hidden_size, BLOCK_H)[None, :]
        row_mean = tl.sum(mean * count, 1) / hidden_size
        between = mean - row_mean[:, None]
        squares += count * (between * between)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1) / hidden_size + EPS))
    in_tokens = token < num_tokens
    if rstd_ptr is not None:
        tl.store(rstd_ptr + token, rstd, mask=in_tokens)
    if mean_ptr is not None:  # not of an RMSNorm
        tl.store(mean_ptr + token, row_mean, mask=in_tokens)
    return row_mean, rstd


@triton.jit
def standardized(s, mean, rstd, LAYER: tl.constexpr):
    """xhat of a tile, equation (18)."""
    if LAYER:
        s -= mean[:, None]
    return s * rstd[:, None]


@triton.jit
def norm_factor(weight_ptr, feature, hidden_size, WEIGHT_OFFSET: tl.constexpr):
    """w + offset of a norm that has a weight, [BLOCK_H] float32."""
    return load_vector(weight_ptr, feature, hidden_size) + WEIGHT_OFFSET


@triton.jit
def store_normed(
    stream_ptr, weight_ptr, bias_ptr, normed_ptr, mean, rstd, token, num_tokens, hidden_size,
    LAYER: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, CAST: tl.constexpr, STREAM: tl.constexpr,
    NORM_STAGES: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """normed = xhat (w + offset) + b of whole rows, whose sum was stored before a barrier.

    The barrier makes what any thread of the block has written visible to all of its threads: it
    orders the stores before it and the loads behind it at the scope of a block, as PTX defines
    `bar.sync`, and a store goes through L1, so no line there is older than it. No other block
    touches these rows. The sum is read in the order in which L2 got it last.
    """
    for start in tl.range(0, hidden_size, BLOCK_H, num_stages=NORM_STAGES):
        feature = start + tl.arange(0, BLOCK_H)
        s = load_rows(stream_ptr, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)
        # Memory wider than the stream may hold it unrounded.
        s = s.to(STREAM).to(tl.float32)
        normed = standardized(s, mean, rstd, LAYER)
        if CAST:
            normed = normed.to(STREAM).to(tl.float32)
        if weight_ptr is not None:
            normed *= norm_factor(weight_ptr, feature, hidden_size, WEIGHT_OFFSET)[None, :]
        if bias_ptr is not None:
            normed += load_vector(bias_ptr, feature, hidden_size)[None, :]
        store_rows(normed_ptr, normed, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "stride_unit_token"])
def bottleneck_norm_fwd_kernel(
    x_ptr, down_weight_ptr, up_weight_ptr,      # in: [T, H], [R, H], [H, R]
    down_bias_ptr, up_bias_ptr,                 # in or None: [R], [H]
    residual_ptr, skip_ptr,                     # in or None: [T, H], [T, H]
    scaling_ptr, scale,                         # in: [1] or [H], or a float, or neither: 1
    weight_ptr, bias_ptr,                       # in or None, of the norm: [H], [H]
    stream_ptr, normed_ptr,                     # out: [T, H], [T, H], which may be one
    z_ptr, mean_ptr, rstd_ptr,                  # out or None: [T, R], [T], [T]
    num_tokens, hidden_size, bottleneck_size,
    stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,  # as without a norm
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    LAYER: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr,
    CAST: tl.constexpr,                         # whether xhat is rounded before the weight
    STREAM: tl.constexpr,                       # the dtype that rounds the sum
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr, R_MULTIPLE: tl.constexpr,
    OUT_STAGES: tl.constexpr, NORM_STAGES: tl.constexpr,                  # of the last two loops
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,  # BLOCK_R >= R
):  # fmt: skip
    """The row-block form with a norm. The grid is as many programs as the plan lets run at once,
    each of which takes one row block after another: so their rows stay within L2.

    Per token: read x (H) twice, residual and skip (H each), write the sum (H), read it (H), write
    normed (H) and z (R). Of these the second read of x and that of the sum find L2's lines, and a
    sum that nobody asked for is overwritten there before it reaches memory.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE  # shows the compiler its vectors
    unit = tl.arange(0, BLOCK_R)
    steps = tl.cdiv(hidden_size, BLOCK_H)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        token = block * BLOCK_T + tl.arange(0, BLOCK_T)
        a = row_block_bottleneck(
            x_ptr, down_weight_ptr, down_bias_ptr, z_ptr, token, unit,
            num_tokens, hidden_size, bottleneck_size, stride_x_token, stride_unit_token,
            ACTIVATION, DTYPE, PRECISION, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
        )  # fmt: skip
        mean = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        squares = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for step in tl.range(0, steps, num_stages=OUT_STAGES):
            feature = (steps - 1 - step) * BLOCK_H + tl.arange(0, BLOCK_H)
            w_up = load_up_tile(
                up_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
            )
            u = up_bias_product(up_bias_ptr, feature, hidden_size, DTYPE, EVEN_H, BLOCK_T, BLOCK_H)
            u = tl.dot(a, tl.trans(w_up).to(DTYPE), u, input_precision=PRECISION)
            s = output_tile(
                u, token, feature,
                x_ptr, residual_ptr, skip_ptr, up_bias_ptr, scaling_ptr, scale,
                num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
                DTYPE, ADD_INPUT, CHANNEL_SCALING, EVEN_H,
            )  # fmt: skip
            mean, squares = merged_statistics(
                mean, squares, s, step, hidden_size, LAYER, EVEN_H, BLOCK_H
            )
            # L2 is to keep these lines.
            store_rows(
                stream_ptr, s.to(STREAM), token, feature, hidden_size, num_tokens, hidden_size,
                EVEN_H, KEEP=True,
            )  # fmt: skip
        row_mean, rstd = stored_statistics(
            mean, squares, token, mean_ptr, rstd_ptr, num_tokens, hidden_size, LAYER, EPS, BLOCK_H
        )
        tl.debug_barrier()
        store_normed(
            stream_ptr, weight_ptr, bias_ptr, normed_ptr, row_mean, rstd, token,
            num_tokens, hidden_size,
            LAYER, WEIGHT_OFFSET, CAST, STREAM, NORM_STAGES, EVEN_H, BLOCK_H,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def norm_rows_kernel(
    stream_ptr, weight_ptr, bias_ptr,  # in: [T, H]; [H] or None
    normed_ptr, mean_ptr, rstd_ptr,    # out: [T, H], which may be the stream; [T] or None
    num_tokens, hidden_size,
    LAYER: tl.constexpr, EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, CAST: tl.constexpr,
    STREAM: tl.constexpr, EVEN_H: tl.constexpr, NORM_STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The norm of a sum that another kernel stored: a program reads its BLOCK_T rows twice."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mean = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    steps = tl.cdiv(hidden_size, BLOCK_H)
    for step in tl.range(0, steps, num_stages=NORM_STAGES):
        feature = (steps - 1 - step) * BLOCK_H + tl.arange(0, BLOCK_H)
        s = load_rows(stream_ptr, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)
        mean, squares = merged_statistics(
            mean, squares, s.to(STREAM).to(tl.float32), step, hidden_size,
            LAYER, EVEN_H, BLOCK_H,
        )  # fmt: skip
    row_mean, rstd = stored_statistics(
        mean, squares, token, mean_ptr, rstd_ptr, num_tokens, hidden_size, LAYER, EPS, BLOCK_H
    )
    tl.debug_barrier()  # normed may take the place of what another thread still reads
    store_normed(
        stream_ptr, weight_ptr, bias_ptr, normed_ptr, row_mean, rstd, token,
        num_tokens, hidden_size,
        LAYER, WEIGHT_OFFSET, CAST, STREAM, NORM_STAGES, EVEN_H, BLOCK_H,
    )  # fmt: skip
