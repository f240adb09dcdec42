"""Backward kernels, equations (5) to (13) of docs/math.md.

First dz and dx, in the two forms of the forward (row block, split); then the weight, bias and
scaling gradients as fixed-order partial sums over slices of the tokens, so that repeated runs give
the same bits.
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
def load_du(
    dy_ptr, scaling_ptr, scale, token, feature,
    num_tokens, hidden_size, stride_dy_token,
    CHANNEL_SCALING: tl.constexpr, EVEN_H: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of du = scaling * dy, equation (5), rounded to the compute dtype as in eager."""
    dy = load_rows(dy_ptr, token, feature, stride_dy_token, num_tokens, hidden_size, EVEN_H).to(
        tl.float32
    )
    return (
        dy * load_scaling(scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING)[None, :]
    ).to(DTYPE)


@triton.jit(do_not_specialize=["num_tokens"])
def bottleneck_bwd_dx_kernel(
    dy_ptr, z_ptr, down_weight_ptr, up_weight_ptr,  # in: [T, H], [T, R], [R, H], [H, R]
    scaling_ptr, scale,                             # in: [1] or [H], or a float
    dx_ptr, dz_ptr,                                 # out: [T, H] or None, [T, R] or None
    num_tokens, hidden_size, bottleneck_size, stride_dy_token,
    DERIVATIVE: tl.constexpr,                       # @triton.jit, float32 -> float32
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,  # BLOCK_R >= R
):  # fmt: skip
    """The row-block form: dz = (du W_up) * act'(z), then dx = dz W_down (+ dy). One program owns
    BLOCK_T tokens.

    HBM per token: read dy (H) and z (R), write dx (H) and dz (R). L2 serves the second read of dy.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.arange(0, BLOCK_R)

    da = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        du = load_du(
            dy_ptr, scaling_ptr, scale, token, feature, num_tokens, hidden_size, stride_dy_token,
            CHANNEL_SCALING, EVEN_H, DTYPE,
        )  # fmt: skip
        w_up = load_weight(
            up_weight_ptr,
            feature[:, None],
            unit[None, :],
            hidden_size,
            bottleneck_size,
            EVEN_H,
            EVEN_R,
        )  # [BLOCK_H, BLOCK_R]
        da = tl.dot(du, w_up.to(DTYPE), da, input_precision=PRECISION)
    if not EVEN_R:  # as for z in the forward: Inf or NaN in dy must not make padded units NaN
        da = tl.where(unit[None, :] < bottleneck_size, da, 0.0)
    z = load_rows(z_ptr, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R)
    dz = (da * DERIVATIVE(z.to(tl.float32))).to(DTYPE)
    if dz_ptr is not None:
        store_rows(dz_ptr, dz, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R)

    if dx_ptr is not None:
        for start in range(0, hidden_size, BLOCK_H):
            feature = start + tl.arange(0, BLOCK_H)
            w_down = load_weight(
                down_weight_ptr,
                unit[:, None],
                feature[None, :],
                bottleneck_size,
                hidden_size,
                EVEN_R,
                EVEN_H,
            )  # [BLOCK_R, BLOCK_H]
            dx = tl.dot(dz, w_down.to(DTYPE), input_precision=PRECISION)
            if ADD_INPUT:
                dy = load_rows(
                    dy_ptr, token, feature, stride_dy_token, num_tokens, hidden_size, EVEN_H
                )
                dx += dy.to(tl.float32)
            store_rows(dx_ptr, dx, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)


@triton.jit(do_not_specialize=["num_tokens"])
def bottleneck_bwd_split_dz_kernel(
    dy_ptr, z_ptr, up_weight_ptr, scaling_ptr, scale,  # in: [T, H], [T, R], [H, R]
    dz_ptr,                                            # out: [T, R], or [S, T, R] partial da
    num_tokens, hidden_size, bottleneck_size, features_per_split, stride_dy_token,
    DERIVATIVE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,                             # more than one split: no derivative yet
    CHANNEL_SCALING: tl.constexpr, EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Split form, first half: dz, or the sum of da over one slice of H. Grid: token blocks, unit
    blocks, splits.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    first = split * features_per_split
    last = tl.minimum(first + features_per_split, hidden_size)

    da = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        du = load_du(
            dy_ptr, scaling_ptr, scale, token, feature, num_tokens, hidden_size, stride_dy_token,
            CHANNEL_SCALING, EVEN_H, DTYPE,
        )  # fmt: skip
        w_up = load_weight(
            up_weight_ptr,
            feature[:, None],
            unit[None, :],
            hidden_size,
            bottleneck_size,
            EVEN_H,
            EVEN_R,
        )  # [BLOCK_H, BLOCK_R]
        da = tl.dot(du, w_up.to(DTYPE), da, input_precision=PRECISION)
    if PARTIAL:
        dz_ptr += split.to(tl.int64) * num_tokens * bottleneck_size
    else:
        z = load_rows(z_ptr, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R)
        da *= DERIVATIVE(z.to(tl.float32))
    store_rows(dz_ptr, da, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def bottleneck_bwd_split_dx_kernel(
    partial_ptr, dz_ptr,             # [S, T, R] in with dz out, or dz in alone
    dy_ptr, z_ptr, down_weight_ptr,  # in: [T, H], [T, R], [R, H]
    dx_ptr,                          # out: [T, H], or None
    num_tokens, hidden_size, bottleneck_size, num_splits, stride_dy_token,
    DERIVATIVE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ADD_INPUT: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Split form, second half: dx from dz. Grid: token blocks, feature blocks (one without dx)."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    feature = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)

    dx = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(0, bottleneck_size, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        if partial_ptr is None:
            dz = load_rows(
                dz_ptr, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R
            )
        else:
            z = load_rows(z_ptr, token, unit, bottleneck_size, num_tokens, bottleneck_size, EVEN_R)
            da = sum_partials(
                partial_ptr, token, unit, num_tokens, bottleneck_size, num_splits, EVEN_R
            )
            dz = (da * DERIVATIVE(z.to(tl.float32))).to(DTYPE)
            if dz_ptr is not None:
                if tl.program_id(1) == 0:
                    store_rows(
                        dz_ptr,
                        dz,
                        token,
                        unit,
                        bottleneck_size,
                        num_tokens,
                        bottleneck_size,
                        EVEN_R,
                    )
        if dx_ptr is not None:
            w_down = load_weight(
                down_weight_ptr,
                unit[:, None],
                feature[None, :],
                bottleneck_size,
                hidden_size,
                EVEN_R,
                EVEN_H,
            )  # [BLOCK_R, BLOCK_H]
            dx = tl.dot(dz, w_down.to(DTYPE), dx, input_precision=PRECISION)
    if dx_ptr is not None:
        if ADD_INPUT:
            dy = load_rows(dy_ptr, token, feature, stride_dy_token, num_tokens, hidden_size, EVEN_H)
            dx += dy.to(tl.float32)
        store_rows(dx_ptr, dx, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)


@triton.jit(do_not_specialize=["num_tokens"])
def bottleneck_bwd_dw_kernel(
    x_ptr, dy_ptr, z_ptr, dz_ptr,                          # in: [T, H], [T, H], [T, R], [T, R]
    scaling_ptr, scale,
    d_down_ptr, d_up_ptr, d_down_bias_ptr, d_up_bias_ptr,  # out or None, [S, ...] of each
    num_tokens, hidden_size, bottleneck_size, tokens_per_split, stride_x_token, stride_dy_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,                                 # float32 sums, scaling still to come
    CHANNEL_SCALING: tl.constexpr, EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dW_down = dz^T x, G = dy^T a, and the column sums of dz and dy, over one slice of the tokens.

    Grid: feature blocks, unit blocks, splits. dW_up = scaling * G and db_up = scaling * sum(dy)
    get their scaling here if there is one split, else in `bottleneck_bwd_dw_sum_kernel`. HBM per
    token: read x and dy (H each), z and dz (R each, from L2 after the first feature block).
    """
    feature = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    unit = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)

    d_down = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    d_up = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    # The bias sums stay whole tiles until the end: a reduction across warps costs a barrier a step.
    dz_total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    dy_total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(first, last, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        if d_down_ptr is not None or d_down_bias_ptr is not None:
            dz = load_rows(dz_ptr, token, unit, bottleneck_size, last, bottleneck_size, EVEN_R)
        if d_down_ptr is not None:
            x = load_rows(x_ptr, token, feature, stride_x_token, last, hidden_size, EVEN_H)
            d_down = tl.dot(tl.trans(dz), x.to(DTYPE), d_down, input_precision=PRECISION)
        if d_down_bias_ptr is not None:
            dz_total += dz.to(tl.float32)
        if d_up_ptr is not None or d_up_bias_ptr is not None:
            dy = load_rows(dy_ptr, token, feature, stride_dy_token, last, hidden_size, EVEN_H)
        if d_up_ptr is not None:
            z = load_rows(z_ptr, token, unit, bottleneck_size, last, bottleneck_size, EVEN_R)
            a = ACTIVATION(z.to(tl.float32)).to(
                DTYPE
            )  # rows beyond the edge vanish because their dy loads as zero
            d_up = tl.dot(tl.trans(dy.to(DTYPE)), a, d_up, input_precision=PRECISION)
        if d_up_bias_ptr is not None:
            dy_total += dy.to(tl.float32)

    d_down_bias = tl.sum(dz_total, 0)
    d_up_bias = tl.sum(dy_total, 0)
    if not PARTIAL:
        scaling = load_scaling(scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING)
        d_up *= scaling[:, None]
        d_up_bias *= scaling
    weight_size = hidden_size * bottleneck_size
    in_features = feature < hidden_size
    in_units = unit < bottleneck_size
    in_both = in_features[:, None] & in_units[None, :]
    if d_down_ptr is not None:
        offsets = split.to(tl.int64) * weight_size + unit[:, None] * hidden_size + feature[None, :]
        tl.store(
            d_down_ptr + offsets, d_down.to(d_down_ptr.dtype.element_ty), mask=tl.trans(in_both)
        )
    if d_up_ptr is not None:
        offsets = (
            split.to(tl.int64) * weight_size + feature[:, None] * bottleneck_size + unit[None, :]
        )
        tl.store(d_up_ptr + offsets, d_up.to(d_up_ptr.dtype.element_ty), mask=in_both)
    if d_down_bias_ptr is not None:
        if tl.program_id(0) == 0:
            total = d_down_bias.to(d_down_bias_ptr.dtype.element_ty)
            tl.store(d_down_bias_ptr + split * bottleneck_size + unit, total, mask=in_units)
    if d_up_bias_ptr is not None:
        if tl.program_id(1) == 0:
            total = d_up_bias.to(d_up_bias_ptr.dtype.element_ty)
            tl.store(d_up_bias_ptr + split * hidden_size + feature, total, mask=in_features)


@triton.jit(do_not_specialize=["num_splits"])
def bottleneck_bwd_dw_sum_kernel(
    part_down_ptr, part_up_ptr,            # in or None: [S, R, H], [S, H, R]
    part_down_bias_ptr, part_up_bias_ptr,  # in or None: [S, R], [S, H]
    up_weight_ptr, up_bias_ptr,            # in: [H, R], [H]
    scaling_ptr, scale,                    # in: [1] or [H], or a float
    d_down_ptr, d_up_ptr,                  # out or None: [R, H], [H, R]
    d_down_bias_ptr, d_up_bias_ptr,        # out or None: [R], [H]
    d_scaling_ptr,                         # out or None: [H] float32
    hidden_size, bottleneck_size, num_splits, units_per_program,
    CHANNEL_SCALING: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums in the order of the splits. Grid: feature blocks, slices of the units.

    d(scaling)[h] = sum_r G[h, r] W_up[h, r] + b_up[h] sum_t dy[t, h], equation (13), needs a whole
    row of G, so there is only one slice of units if it is needed.
    """
    feature = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_features = feature < hidden_size
    scaling = load_scaling(scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING)
    d_scaling = tl.zeros((BLOCK_H,), tl.float32)
    weight_size = hidden_size * bottleneck_size

    first = tl.program_id(1) * units_per_program
    for start in range(first, tl.minimum(first + units_per_program, bottleneck_size), BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        mask = in_features[:, None] & (unit < bottleneck_size)[None, :]
        if part_down_ptr is not None:
            offsets = unit[None, :] * hidden_size + feature[:, None]
            total = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
            part_ptr = part_down_ptr + offsets
            for _ in range(num_splits):
                total += tl.load(part_ptr, mask=mask, other=0.0)
                part_ptr += weight_size
            tl.store(d_down_ptr + offsets, total.to(d_down_ptr.dtype.element_ty), mask=mask)
        if part_up_ptr is not None:
            offsets = feature[:, None] * bottleneck_size + unit[None, :]
            total = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
            part_ptr = part_up_ptr + offsets
            for _ in range(num_splits):
                total += tl.load(part_ptr, mask=mask, other=0.0)
                part_ptr += weight_size
            if d_up_ptr is not None:
                tl.store(
                    d_up_ptr + offsets,
                    (total * scaling[:, None]).to(d_up_ptr.dtype.element_ty),
                    mask=mask,
                )
            if d_scaling_ptr is not None:
                w_up = tl.load(up_weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                d_scaling += tl.sum(total * w_up, 1)
        if part_down_bias_ptr is not None:
            if tl.program_id(0) == 0:
                total_bias = tl.zeros((BLOCK_R,), tl.float32)
                for split in range(num_splits):
                    total_bias += load_vector(
                        part_down_bias_ptr + split * bottleneck_size, unit, bottleneck_size
                    )
                d_down_bias = total_bias.to(d_down_bias_ptr.dtype.element_ty)
                tl.store(d_down_bias_ptr + unit, d_down_bias, mask=unit < bottleneck_size)

    if part_up_bias_ptr is not None:
        if tl.program_id(1) == 0:
            total_up_bias = tl.zeros((BLOCK_H,), tl.float32)
            for split in range(num_splits):
                total_up_bias += load_vector(
                    part_up_bias_ptr + split * hidden_size, feature, hidden_size
                )
            if d_up_bias_ptr is not None:
                d_up_bias = (total_up_bias * scaling).to(d_up_bias_ptr.dtype.element_ty)
                tl.store(d_up_bias_ptr + feature, d_up_bias, mask=in_features)
            d_scaling += load_vector(up_bias_ptr, feature, hidden_size) * total_up_bias
    if d_scaling_ptr is not None:
        tl.store(d_scaling_ptr + feature, d_scaling, mask=in_features)
