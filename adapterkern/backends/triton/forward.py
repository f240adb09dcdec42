"""Forward kernels, equations (1) to (4) of docs/math.md.

Two forms of y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up):

- row block: one program owns BLOCK_T tokens and all of R; `a = act(z)` never leaves the chip.
- split: one kernel computes z (partial sums over slices of H if there are few tokens), a second y.
  It fills the GPU with few tokens, and takes bottlenecks too wide for one program.
"""

import triton
import triton.language as tl

from adapterkern.backends.triton.tiles import (
    awaited,
    existing_units,
    load_down_tile,
    load_rows,
    load_units,
    load_up_tile,
    load_vector,
    plus_product,
    scaled,
    store_rows,
    store_units,
    sum_partials,
)


@triton.jit
def down_projection(
    x_ptr, down_weight_ptr, token, unit, first, last,
    num_tokens, hidden_size, bottleneck_size, stride_x_token,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x W_down^T over the features from `first` to `last`, [BLOCK_T, BLOCK_R] float32."""
    z = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        x = load_rows(x_ptr, token, feature, stride_x_token, num_tokens, hidden_size, EVEN_H)
        w_down = load_down_tile(
            down_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
        )
        z = tl.dot(x.to(DTYPE), tl.trans(w_down).to(DTYPE), z, input_precision=PRECISION)
        if x_ptr.dtype.element_ty != DTYPE:
            z = awaited(z)
    return z


@triton.jit
def up_bias_product(
    up_bias_ptr, feature, hidden_size, DTYPE: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Where the second product begins: b_up in every row of [BLOCK_T, BLOCK_H] float32, if it has
    the half precision of the products, else zeros.

    It comes as a product with ones, which is exact. Its vector then takes 16 bytes a copy and no
    register; one that is added takes 4 bytes a copy in every thread that adds it, and a third of
    the loop's instructions.
    """
    if up_bias_ptr is not None and is_multiplied(up_bias_ptr, DTYPE):
        row = tl.arange(0, 16)  # the least depth of a product; all rows but the first are zero
        offsets = row[:, None] * 0 + feature[None, :]
        mask = row[:, None] == 0
        if not EVEN_H:
            mask = mask & (feature[None, :] < hidden_size)
        bias = tl.load(up_bias_ptr + offsets, mask=mask, other=0.0)
        u = tl.dot(tl.full((BLOCK_T, 16), 1.0, tl.float32).to(DTYPE), bias)
    else:
        u = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    return u


@triton.constexpr_function
def is_multiplied(bias_ptr, DTYPE):
    """Whether `up_bias_product` takes this bias; another is added in `output_tile`."""
    return bias_ptr.dtype.element_ty == DTYPE and DTYPE.primitive_bitwidth == 16


@triton.jit
def output_tile(
    u, token, feature,  # [BLOCK_T, BLOCK_H] float32, its indices
    x_ptr, residual_ptr, skip_ptr, up_bias_ptr, scaling_ptr, scale,
    num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
    DTYPE: tl.constexpr,
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """y = scaling * (u + b_up) + residual + skip, equation (4), in float32; b_up is in u already
    where it was multiplied."""
    if up_bias_ptr is not None and not is_multiplied(up_bias_ptr, DTYPE):
        u += load_vector(up_bias_ptr, feature, hidden_size)[None, :]
    y = scaled(u, scaling_ptr, scale, feature[None, :], hidden_size, CHANNEL_SCALING)
    if ADD_INPUT:
        x = load_rows(x_ptr, token, feature, stride_x_token, num_tokens, hidden_size, EVEN_H)
        y += x.to(tl.float32)
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
    return y


@triton.jit
def row_block_bottleneck(
    x_ptr, down_weight_ptr, down_bias_ptr, z_ptr, token, unit,
    num_tokens, hidden_size, bottleneck_size, stride_x_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """a = act(z) of a row block and all of R, [BLOCK_T, BLOCK_R]; z is stored where asked for."""
    z = down_projection(
        x_ptr, down_weight_ptr, token, unit, 0, hidden_size,
        num_tokens, hidden_size, bottleneck_size, stride_x_token,
        DTYPE, PRECISION, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    z += load_vector(down_bias_ptr, unit, bottleneck_size)[None, :]
    z = existing_units(z, unit, bottleneck_size, EVEN_R)
    # Round z and a to the compute dtype where eager does: backward recomputes a from the stored z,
    # and the second product runs on the tensor cores.
    z = z.to(DTYPE)
    if z_ptr is not None:
        store_units(z_ptr, z, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
    return ACTIVATION(z.to(tl.float32)).to(DTYPE)


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "stride_unit_token"])
def bottleneck_fwd_kernel(
    x_ptr, down_weight_ptr, up_weight_ptr,  # in: [T, H], [R, H], [H, R]
    down_bias_ptr, up_bias_ptr,             # in or None: [R], [H]
    residual_ptr, skip_ptr,                 # in or None: [T, H], [T, H]
    scaling_ptr, scale,                     # in: [1] or [H], or a float, or neither: 1
    y_ptr, z_ptr,                           # out: [T, H], [T, R] or None
    num_tokens, hidden_size, bottleneck_size,
    stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
    ACTIVATION: tl.constexpr,                      # @triton.jit, float32 -> float32
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,  # of the products
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,                           # sizes that need no mask
    R_MULTIPLE: tl.constexpr,                                             # divides R
    OUT_STAGES: tl.constexpr,                                             # of the second loop
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,  # BLOCK_R >= R
):  # fmt: skip
    """The row-block form. One program owns BLOCK_T tokens and all of R.

    Per token: read x (H) twice, residual and skip if given (H each), write y (H) and z (R). The
    second read of x goes backwards, because L2 has kept the features that were read last: all of
    them while the rows of all resident programs stay within some 30 MB, a part of them beyond.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE  # shows the compiler its vectors
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.arange(0, BLOCK_R)

    a = row_block_bottleneck(
        x_ptr, down_weight_ptr, down_bias_ptr, z_ptr, token, unit,
        num_tokens, hidden_size, bottleneck_size, stride_x_token, stride_unit_token,
        ACTIVATION, DTYPE, PRECISION, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    steps = tl.cdiv(hidden_size, BLOCK_H)
    for step in tl.range(0, steps, num_stages=OUT_STAGES):  # with it, x is pipelined too
        feature = (steps - 1 - step) * BLOCK_H + tl.arange(0, BLOCK_H)
        w_up = load_up_tile(
            up_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
        )
        u = up_bias_product(up_bias_ptr, feature, hidden_size, DTYPE, EVEN_H, BLOCK_T, BLOCK_H)
        u = tl.dot(a, tl.trans(w_up).to(DTYPE), u, input_precision=PRECISION)
        y = output_tile(
            u, token, feature,
            x_ptr, residual_ptr, skip_ptr, up_bias_ptr, scaling_ptr, scale,
            num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
            DTYPE, ADD_INPUT, CHANNEL_SCALING, EVEN_H,
        )  # fmt: skip
        store_rows(y_ptr, y, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "stride_unit_token"])
def bottleneck_fwd_down_kernel(
    x_ptr, down_weight_ptr, down_bias_ptr,  # in: [T, H], [R, H], [R]
    partial_ptr,                            # out: [S, T, R] float32, or None with the two below
    z_ptr, a_ptr,                           # out: [T, R], the first None if nobody asked for it
    num_tokens, hidden_size, bottleneck_size, features_per_split, stride_x_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr, R_MULTIPLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Split form, first half: z and a = act(z), or the sum of z over one slice of H. Grid: token
    blocks, unit blocks, splits.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    first = split * features_per_split
    last = tl.minimum(first + features_per_split, hidden_size)

    z = down_projection(
        x_ptr, down_weight_ptr, token, unit, first, last,
        num_tokens, hidden_size, bottleneck_size, stride_x_token,
        DTYPE, PRECISION, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    if partial_ptr is not None:
        partial_ptr += split.to(tl.int64) * num_tokens * (stride_unit_token // 8 * 8)
        store_units(
            partial_ptr, z, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
        )
    else:
        z += load_vector(down_bias_ptr, unit, bottleneck_size)[None, :]
        z = z.to(DTYPE)
        a = existing_units(ACTIVATION(z.to(tl.float32)), unit, bottleneck_size, EVEN_R)
        if z_ptr is not None:
            store_units(
                z_ptr, z, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
            )
        store_units(a_ptr, a, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)


@triton.jit
def finished_bottleneck(
    partial_ptr, a_ptr, down_bias_ptr, z_ptr, token, unit,
    num_tokens, bottleneck_size, num_splits, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, EVEN_R: tl.constexpr, SUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of a from the partial sums of z, of which the first feature slice stores z for the
    backward; or, where H was not sliced, a itself.
    """
    if partial_ptr is None:
        a = load_units(a_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
    else:
        z = load_vector(down_bias_ptr, unit, bottleneck_size)[None, :] + sum_partials(
            partial_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, num_splits,
            EVEN_R, SUM_STAGES,
        )  # fmt: skip
        z = z.to(DTYPE)
        if z_ptr is not None:
            if tl.program_id(1) == 0:
                store_units(
                    z_ptr, z, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
                )
        a = existing_units(ACTIVATION(z.to(tl.float32)), unit, bottleneck_size, EVEN_R).to(DTYPE)
    return a


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "num_splits", "stride_unit_token"])
def bottleneck_fwd_up_kernel(
    partial_ptr, a_ptr,                                # in: [S, T, R], or [T, R]; the other None
    x_ptr, up_weight_ptr, down_bias_ptr, up_bias_ptr,  # in: [T, H], [H, R], [R], [H]
    residual_ptr, skip_ptr, scaling_ptr, scale,        # in: as above
    y_ptr, z_ptr,                                      # out: [T, H], [T, R] or None
    num_tokens, hidden_size, bottleneck_size, num_splits, features_per_program,
    stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr, R_MULTIPLE: tl.constexpr,
    ONE_TILE: tl.constexpr,                            # BLOCK_R >= R
    OUT_STAGES: tl.constexpr, SUM_STAGES: tl.constexpr,  # of the loops over features and splits
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Split form, second half: y from z. Grid: token blocks, slices of the features.

    Every program adds up the partial sums, if any, of its tokens (they are in L2): once for all of
    its features where one tile holds R, so that few programs repeat the sums.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.arange(0, BLOCK_R)
    if ONE_TILE:
        a = finished_bottleneck(
            partial_ptr, a_ptr, down_bias_ptr, z_ptr, token, unit,
            num_tokens, bottleneck_size, num_splits, stride_unit_token,
            ACTIVATION, DTYPE, EVEN_R, SUM_STAGES,
        )  # fmt: skip
    first = tl.program_id(1) * features_per_program
    last = tl.minimum(first + features_per_program, hidden_size)
    for start in tl.range(first, last, BLOCK_H, num_stages=OUT_STAGES):
        feature = start + tl.arange(0, BLOCK_H)
        u = up_bias_product(up_bias_ptr, feature, hidden_size, DTYPE, EVEN_H, BLOCK_T, BLOCK_H)
        if ONE_TILE:
            w_up = load_up_tile(
                up_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
            )
            u = tl.dot(a, tl.trans(w_up).to(DTYPE), u, input_precision=PRECISION)
        else:
            for first_unit in range(0, bottleneck_size, BLOCK_R):
                unit = first_unit + tl.arange(0, BLOCK_R)
                a = finished_bottleneck(
                    partial_ptr, a_ptr, down_bias_ptr, z_ptr, token, unit,
                    num_tokens, bottleneck_size, num_splits, stride_unit_token,
                    ACTIVATION, DTYPE, EVEN_R, SUM_STAGES,
                )  # fmt: skip
                w_up = load_up_tile(
                    up_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
                )
                u = plus_product(u, a, tl.trans(w_up).to(DTYPE), PRECISION)
        y = output_tile(
            u, token, feature,
            x_ptr, residual_ptr, skip_ptr, up_bias_ptr, scaling_ptr, scale,
            num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
            DTYPE, ADD_INPUT, CHANNEL_SCALING, EVEN_H,
        )  # fmt: skip
        store_rows(y_ptr, y, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)
