"""Forward kernels, equations (1) to (4) of docs/math.md.

Two forms of y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up):

- row block: one program owns BLOCK_T tokens and all of R; `a = act(z)` never leaves the chip.
- split: one kernel computes z (partial sums over slices of H if there are few tokens), a second y.
  It fills the GPU with few tokens, and takes bottlenecks too wide for one program.
"""

import triton
import triton.language as tl

from adapterkern.backends.triton.tiles import (
    load_rows,
    load_scaling,
    load_vector,
    load_weight,
    store_rows,
    sum_partials,
)


@triton.jit
def store_output(
    u, token, feature,  # [BLOCK_T, BLOCK_H] float32, its indices
    x_ptr, residual_ptr, skip_ptr, up_bias_ptr, scaling_ptr, scale, y_ptr,
    num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """y = scaling * (u + b_up) + residual + skip, equation (4), in float32 until the store."""
    y = u + load_vector(up_bias_ptr, feature, hidden_size)[None, :]
    y *= load_scaling(scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING)[None, :]
    if ADD_INPUT:  # the down-projection has just read x, so this read comes from L2
        y += load_rows(x_ptr, token, feature, stride_x_token, num_tokens, hidden_size, EVEN_H).to(
            tl.float32
        )
    if residual_ptr is not None:
        residual = load_rows(
            residual_ptr, token, feature, stride_residual_token, num_tokens, hidden_size, EVEN_H
        )
        y += residual.to(tl.float32)
    if skip_ptr is not None:
        skip = load_rows(
            skip_ptr, token, feature, stride_skip_token, num_tokens, hidden_size, EVEN_H
        )
        y += skip.to(tl.float32)
    store_rows(y_ptr, y, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)


@triton.jit(do_not_specialize=["num_tokens"])
def bottleneck_fwd_kernel(
    x_ptr, down_weight_ptr, up_weight_ptr,  # in: [T, H], [R, H], [H, R]
    down_bias_ptr, up_bias_ptr,             # in or None: [R], [H]
    residual_ptr, skip_ptr,                 # in or None: [T, H], [T, H]
    scaling_ptr, scale,                     # in: [1] or [H], or a float
    y_ptr, z_ptr,                           # out: [T, H], [T, R] or None
    num_tokens, hidden_size, bottleneck_size,
    stride_x_token, stride_residual_token, stride_skip_token,
    ACTIVATION: tl.constexpr,                      # @triton.jit, float32 -> float32
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,  # of the products
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,                           # sizes that need no mask
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,  # BLOCK_R >= R
):  # fmt: skip
    """The row-block form. One program owns BLOCK_T tokens and all of R.

    HBM per token: read x (H), residual and skip if given (H each), write y (H) and z (R). L2 serves
    the second read of x, which the first one left there, and both weights.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.arange(0, BLOCK_R)

    z = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        x = load_rows(x_ptr, token, feature, stride_x_token, num_tokens, hidden_size, EVEN_H)
        w_down = load_weight(
            down_weight_ptr,
            unit[None, :],
            feature[:, None],
            bottleneck_size,
            hidden_size,
            EVEN_R,
            EVEN_H,
        )  # [BLOCK_H, BLOCK_R]
        z = tl.dot(x.to(DTYPE), w_down.to(DTYPE), z, input_precision=PRECISION)
    z += load_vector(down_bias_ptr, unit, bottleneck_size)[None, :]
    # Padded units vanish because their w_up rows load as zero, not because act(0) == 0 (false for
    # sigmoid). Inf or NaN in x times the zeros of their w_down is NaN, and NaN times zero would
    # spoil a row that eager keeps finite.
    if not EVEN_R:
        z = tl.where(unit[None, :] < bottleneck_size, z, 0.0)
    # Round z and a to the compute dtype where eager does: backward recomputes a from the stored z,
    # and the second product runs on the tensor cores.
    z = z.to(DTYPE)
    if z_ptr is not None:
        store_rows(z_ptr, z, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R)
    a = ACTIVATION(z.to(tl.float32)).to(DTYPE)

    for start in range(0, hidden_size, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        w_up = load_weight(
            up_weight_ptr,
            feature[None, :],
            unit[:, None],
            hidden_size,
            bottleneck_size,
            EVEN_H,
            EVEN_R,
        )  # [BLOCK_R, BLOCK_H]
        u = tl.dot(a, w_up.to(DTYPE), input_precision=PRECISION)
        store_output(
            u, token, feature,
            x_ptr, residual_ptr, skip_ptr, up_bias_ptr, scaling_ptr, scale, y_ptr,
            num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
            ADD_INPUT, CHANNEL_SCALING, EVEN_H,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def bottleneck_fwd_down_kernel(
    x_ptr, down_weight_ptr, down_bias_ptr,  # in: [T, H], [R, H], [R]
    z_ptr,                                  # out: [T, R], or [S, T, R] float32 partials
    num_tokens, hidden_size, bottleneck_size, features_per_split, stride_x_token,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,                  # more than one split: no bias yet
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Split form, first half: z, or its sum over one slice of H. Grid: token blocks, unit blocks,
    splits.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    first = split * features_per_split
    last = tl.minimum(first + features_per_split, hidden_size)

    z = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        x = load_rows(x_ptr, token, feature, stride_x_token, num_tokens, hidden_size, EVEN_H)
        w_down = load_weight(
            down_weight_ptr,
            unit[None, :],
            feature[:, None],
            bottleneck_size,
            hidden_size,
            EVEN_R,
            EVEN_H,
        )  # [BLOCK_H, BLOCK_R]
        z = tl.dot(x.to(DTYPE), w_down.to(DTYPE), z, input_precision=PRECISION)
    if PARTIAL:
        z_ptr += split.to(tl.int64) * num_tokens * bottleneck_size
    else:
        z += load_vector(down_bias_ptr, unit, bottleneck_size)[None, :]
    store_rows(z_ptr, z, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def bottleneck_fwd_up_kernel(
    partial_ptr, z_ptr,                                # [S, T, R] in with z out, or z in alone
    x_ptr, up_weight_ptr, down_bias_ptr, up_bias_ptr,  # in: [T, H], [H, R], [R], [H]
    residual_ptr, skip_ptr, scaling_ptr, scale,        # in: as above
    y_ptr,                                             # out: [T, H]
    num_tokens, hidden_size, bottleneck_size, num_splits,
    stride_x_token, stride_residual_token, stride_skip_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Split form, second half: y from z. Grid: token blocks, feature blocks.

    Every program adds up the partial sums, if any, of its tokens (they are in L2), and the first
    feature block stores z for backward.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    feature = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)

    u = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(0, bottleneck_size, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        if partial_ptr is None:
            z = load_rows(z_ptr, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R)
        else:
            z = sum_partials(
                partial_ptr, token, unit, num_tokens, bottleneck_size, num_splits, EVEN_R
            )
            z = (z + load_vector(down_bias_ptr, unit, bottleneck_size)[None, :]).to(DTYPE)
            if z_ptr is not None:
                if tl.program_id(1) == 0:
                    store_rows(
                        z_ptr, z, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R
                    )
        a = ACTIVATION(z.to(tl.float32)).to(DTYPE)
        w_up = load_weight(
            up_weight_ptr,
            feature[None, :],
            unit[:, None],
            hidden_size,
            bottleneck_size,
            EVEN_H,
            EVEN_R,
        )  # [BLOCK_R, BLOCK_H]
        u = tl.dot(a, w_up.to(DTYPE), u, input_precision=PRECISION)
    store_output(
        u, token, feature, x_ptr, residual_ptr, skip_ptr, up_bias_ptr, scaling_ptr, scale, y_ptr,
        num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
        ADD_INPUT, CHANNEL_SCALING, EVEN_H,
    )  # fmt: skip
