"""Backward kernels of the tokens, equations (5), (9) and (12) of docs/math.md.

They make dz, a = act(z) and dx, in the two forms of the forward (row block, split);
`weight_gradients` reads dz and a.
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
    plus_product,
    scaled,
    store_rows,
    store_units,
    sum_partials,
)


@triton.jit
def bottleneck_gradient(
    dy_ptr, up_weight_ptr, scaling_ptr, scale, token, unit, first, last,
    num_tokens, hidden_size, bottleneck_size, stride_dy_token,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    stride_up_feature=None,
):  # fmt: skip
    """da = (scaling * dy) W_up over the features `first` to `last`, [BLOCK_T, BLOCK_R] float32.

    No scaling touches dy: of one dtype with the products it goes into them as it lies in memory. A
    learned [H] scales the tile of W_up instead, which is smaller, and rounds it once more; a single
    scaling comes after the sum.
    """
    da = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        dy = load_rows(dy_ptr, token, feature, stride_dy_token, num_tokens, hidden_size, EVEN_H)
        w_up = load_up_tile(
            up_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H,
            stride_up_feature,
        )  # fmt: skip
        if CHANNEL_SCALING:
            w_up = scaled(w_up, scaling_ptr, scale, feature[:, None], hidden_size, True)
        da = tl.dot(dy.to(DTYPE), w_up.to(DTYPE), da, input_precision=PRECISION)
        if dy_ptr.dtype.element_ty != DTYPE:
            da = awaited(da)
    if not CHANNEL_SCALING:
        da = scaled(da, scaling_ptr, scale, unit[None, :], bottleneck_size, False)
    return da


@triton.jit
def store_activation(
    z_ptr, a_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size,
    ACTIVATION: tl.constexpr, EVEN_R: tl.constexpr,
):  # fmt: skip
    """a = act(z), for dW_up. It reads z anew, which L2 has: what act and its derivative share would
    else wait in the registers of a whole tile, and more than one block an SM would not fit.
    """
    z = load_units(z_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
    a = ACTIVATION(z.to(tl.float32))
    store_units(a_ptr, a, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)


@triton.jit
def store_dx(
    dx, token, feature, dy_ptr, dx_ptr, num_tokens, hidden_size, stride_dy_token,
    ADD_INPUT: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """dx = dz W_down (+ dy), equation (12)."""
    if ADD_INPUT:
        dy = load_rows(dy_ptr, token, feature, stride_dy_token, num_tokens, hidden_size, EVEN_H)
        dx += dy.to(tl.float32)
    store_rows(dx_ptr, dx, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)


@triton.jit
def finished_units(
    z, da, z_ptr, dz_ptr, a_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, DTYPE: tl.constexpr, EVEN_R: tl.constexpr,
):  # fmt: skip
    """dz of a row block from z and da, equation (9); dz and a are stored where asked for."""
    dz = existing_units(GRADIENT(z.to(tl.float32), da), unit, bottleneck_size, EVEN_R).to(DTYPE)
    if dz_ptr is not None:
        store_units(dz_ptr, dz, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
    if a_ptr is not None:
        store_activation(
            z_ptr, a_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size,
            ACTIVATION, EVEN_R,
        )  # fmt: skip
    return dz


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "stride_unit_token"])
def bottleneck_bwd_dx_kernel(
    dy_ptr, z_ptr, down_weight_ptr, up_weight_ptr,  # in: [T, H], [T, R], [R, H], [H, R]
    scaling_ptr, scale,                             # in: [1] or [H], or a float, or neither: 1
    dx_ptr, dz_ptr, a_ptr,                          # out or None: [T, H], [T, R], [T, R]
    num_tokens, hidden_size, bottleneck_size, stride_dy_token, stride_unit_token,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,  # @triton.jit, of float32: z; z and da
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr, R_MULTIPLE: tl.constexpr,
    OUT_STAGES: tl.constexpr,                                             # of the second loop
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,  # BLOCK_R >= R
):  # fmt: skip
    """The row-block form: dz = (du W_up) * act'(z), then dx = dz W_down (+ dy), and beside dz the
    a = act(z) that dW_up is made of. One program owns BLOCK_T tokens.

    Per token: read dy (H) twice and z (R), write dx (H), dz and a (R each). The second read of dy
    goes backwards, as that of x in the forward. Where only a is asked for, dy is not read.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE  # shows the compiler its vectors
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.arange(0, BLOCK_R)

    # z is asked for before the loop, which hides the time until it arrives.
    z = load_units(z_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
    if dx_ptr is not None or dz_ptr is not None:
        da = bottleneck_gradient(
            dy_ptr, up_weight_ptr, scaling_ptr, scale, token, unit, 0, hidden_size,
            num_tokens, hidden_size, bottleneck_size, stride_dy_token,
            DTYPE, PRECISION, CHANNEL_SCALING, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
        )  # fmt: skip
        dz = finished_units(
            z, da, z_ptr, dz_ptr, a_ptr, token, unit, stride_unit_token, num_tokens,
            bottleneck_size, ACTIVATION, GRADIENT, DTYPE, EVEN_R,
        )  # fmt: skip
    elif a_ptr is not None:
        store_activation(
            z_ptr, a_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size,
            ACTIVATION, EVEN_R,
        )  # fmt: skip

    if dx_ptr is not None:
        steps = tl.cdiv(hidden_size, BLOCK_H)
        for step in tl.range(0, steps, num_stages=OUT_STAGES):
            feature = (steps - 1 - step) * BLOCK_H + tl.arange(0, BLOCK_H)
            w_down = load_down_tile(
                down_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
            )
            dx = tl.dot(dz, w_down.to(DTYPE), input_precision=PRECISION)
            store_dx(
                dx, token, feature, dy_ptr, dx_ptr, num_tokens, hidden_size, stride_dy_token,
                ADD_INPUT, EVEN_H,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "stride_unit_token"])
def bottleneck_bwd_split_dz_kernel(
    dy_ptr, z_ptr, up_weight_ptr, scaling_ptr, scale,  # in: [T, H], [T, R], [H, R]
    partial_ptr,                                       # out: [S, T, R] float32 of da, or None with
    dz_ptr, a_ptr,                                     # out or None: [T, R]
    num_tokens, hidden_size, bottleneck_size, features_per_split,
    stride_dy_token, stride_unit_token,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    CHANNEL_SCALING: tl.constexpr, EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    R_MULTIPLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Split form, first half: dz and a, or the sum of da over one slice of H. Grid: token blocks,
    unit blocks, splits. Where only a is asked for, dy is not read.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    first = split * features_per_split
    last = tl.minimum(first + features_per_split, hidden_size)

    if partial_ptr is not None or dz_ptr is not None:
        da = bottleneck_gradient(
            dy_ptr, up_weight_ptr, scaling_ptr, scale, token, unit, first, last,
            num_tokens, hidden_size, bottleneck_size, stride_dy_token,
            DTYPE, PRECISION, CHANNEL_SCALING, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
        )  # fmt: skip
    if partial_ptr is not None:
        partial_ptr += split.to(tl.int64) * num_tokens * (stride_unit_token // 8 * 8)
        store_units(
            partial_ptr, da, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
        )
    else:
        if dz_ptr is not None:
            z = load_units(
                z_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
            )
            dz = existing_units(GRADIENT(z.to(tl.float32), da), unit, bottleneck_size, EVEN_R)
            store_units(
                dz_ptr, dz, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
            )
        if a_ptr is not None:
            store_activation(
                z_ptr, a_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size,
                ACTIVATION, EVEN_R,
            )  # fmt: skip


@triton.jit
def finished_dz(
    partial_ptr, dz_ptr, a_ptr, z_ptr, token, unit,
    num_tokens, bottleneck_size, num_splits, stride_unit_token,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, DTYPE: tl.constexpr, EVEN_R: tl.constexpr,
    SUM_STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of dz from the partial sums of da, of which the first feature slice stores dz and a
    for the weight gradients; or, where H was not sliced, dz itself.
    """
    if partial_ptr is None:
        dz = load_units(dz_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
    else:
        z = load_units(z_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
        da = sum_partials(
            partial_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, num_splits,
            EVEN_R, SUM_STAGES,
        )  # fmt: skip
        dz = existing_units(GRADIENT(z.to(tl.float32), da), unit, bottleneck_size, EVEN_R)
        dz = dz.to(DTYPE)
        if tl.program_id(1) == 0:
            if dz_ptr is not None:
                store_units(
                    dz_ptr, dz, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
                )
            if a_ptr is not None:
                store_activation(
                    z_ptr, a_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size,
                    ACTIVATION, EVEN_R,
                )  # fmt: skip
    return dz


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "num_splits", "stride_unit_token"])
def bottleneck_bwd_split_dx_kernel(
    partial_ptr,                     # in: [S, T, R] float32 of da; None: dz is in, a is done
    dz_ptr, a_ptr,                   # out or None: [T, R]
    dy_ptr, z_ptr, down_weight_ptr,  # in: [T, H], [T, R], [R, H]
    dx_ptr,                          # out: [T, H], or None
    num_tokens, hidden_size, bottleneck_size, num_splits, features_per_program,
    stride_dy_token, stride_unit_token,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ADD_INPUT: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr, R_MULTIPLE: tl.constexpr,
    ONE_TILE: tl.constexpr,          # BLOCK_R >= R
    OUT_STAGES: tl.constexpr, SUM_STAGES: tl.constexpr,  # of the loops over features and splits
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Split form, second half: dx from dz. Grid: token blocks, slices of the features (one without
    dx). The sums are added up as in the forward: once for all features where one tile holds R.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    unit = tl.arange(0, BLOCK_R)
    if ONE_TILE:
        dz = finished_dz(
            partial_ptr, dz_ptr, a_ptr, z_ptr, token, unit,
            num_tokens, bottleneck_size, num_splits, stride_unit_token,
            ACTIVATION, GRADIENT, DTYPE, EVEN_R, SUM_STAGES,
        )  # fmt: skip
    first = tl.program_id(1) * features_per_program
    last = tl.minimum(first + features_per_program, hidden_size)
    for start in tl.range(first, last, BLOCK_H, num_stages=OUT_STAGES):
        feature = start + tl.arange(0, BLOCK_H)
        dx = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        if not ONE_TILE:
            for first_unit in range(0, bottleneck_size, BLOCK_R):
                unit = first_unit + tl.arange(0, BLOCK_R)
                dz = finished_dz(
                    partial_ptr, dz_ptr, a_ptr, z_ptr, token, unit,
                    num_tokens, bottleneck_size, num_splits, stride_unit_token,
                    ACTIVATION, GRADIENT, DTYPE, EVEN_R, SUM_STAGES,
                )  # fmt: skip
                if dx_ptr is not None:
                    w_down = load_down_tile(
                        down_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
                    )
                    dx = plus_product(dx, dz, w_down.to(DTYPE), PRECISION)
        if dx_ptr is not None:
            if ONE_TILE:
                w_down = load_down_tile(
                    down_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
                )
                dx = tl.dot(dz, w_down.to(DTYPE), input_precision=PRECISION)
            store_dx(
                dx, token, feature, dy_ptr, dx_ptr, num_tokens, hidden_size, stride_dy_token,
                ADD_INPUT, EVEN_H,
            )  # fmt: skip
