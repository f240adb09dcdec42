"""Backward kernels, equations (5) to (13) of docs/math.md.

First dz, a = act(z) and dx, in the two forms of the forward (row block, split); then the weight,
bias and scaling gradients as fixed-order partial sums over slices of the tokens, so that repeated
runs give the same bits.
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
            up_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
        )
        if CHANNEL_SCALING:
            w_up = scaled(w_up, scaling_ptr, scale, feature[:, None], hidden_size, True)
        da = tl.dot(dy.to(DTYPE), w_up.to(DTYPE), da, input_precision=PRECISION)
        if dy_ptr.dtype.element_ty != DTYPE:
            da = awaited(da)
    if not CHANNEL_SCALING:
        da = scaled(da, scaling_ptr, scale, unit[None, :], bottleneck_size, False)
    return da


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


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "stride_unit_token"])
def bottleneck_bwd_dx_kernel(
    dy_ptr, z_ptr, down_weight_ptr, up_weight_ptr,  # in: [T, H], [T, R], [R, H], [H, R]
    scaling_ptr, scale,                             # in: [1] or [H], or a float, or neither: 1
    dx_ptr, dz_ptr, a_ptr,                          # out or None: [T, H], [T, R], [T, R]
    num_tokens, hidden_size, bottleneck_size, stride_dy_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr,  # @triton.jit, float32 -> float32
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
        dz = existing_units(da * DERIVATIVE(z.to(tl.float32)), unit, bottleneck_size, EVEN_R)
        dz = dz.to(DTYPE)
        if dz_ptr is not None:
            store_units(
                dz_ptr, dz, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
            )
    if a_ptr is not None:
        a = ACTIVATION(z.to(tl.float32))
        store_units(a_ptr, a, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)

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
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr,
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
        z = load_units(z_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
        if dz_ptr is not None:
            dz = da * DERIVATIVE(z.to(tl.float32))
            store_units(
                dz_ptr, dz, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
            )
        if a_ptr is not None:
            a = ACTIVATION(z.to(tl.float32))
            store_units(
                a_ptr, a, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
            )


@triton.jit
def finished_dz(
    partial_ptr, dz_ptr, a_ptr, z_ptr, token, unit,
    num_tokens, bottleneck_size, num_splits, stride_unit_token,
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr, DTYPE: tl.constexpr, EVEN_R: tl.constexpr,
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
            EVEN_R,
        )  # fmt: skip
        dz = (da * DERIVATIVE(z.to(tl.float32))).to(DTYPE)
        if tl.program_id(1) == 0:
            if dz_ptr is not None:
                store_units(
                    dz_ptr, dz, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
                )
            if a_ptr is not None:
                a = ACTIVATION(z.to(tl.float32))
                store_units(
                    a_ptr, a, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
                )
    return existing_units(dz, unit, bottleneck_size, EVEN_R)


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "num_splits", "stride_unit_token"])
def bottleneck_bwd_split_dx_kernel(
    partial_ptr,                     # in: [S, T, R] float32 of da; None: dz is in, a is done
    dz_ptr, a_ptr,                   # out or None: [T, R]
    dy_ptr, z_ptr, down_weight_ptr,  # in: [T, H], [T, R], [R, H]
    dx_ptr,                          # out: [T, H], or None
    num_tokens, hidden_size, bottleneck_size, num_splits, features_per_program,
    stride_dy_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ADD_INPUT: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr, R_MULTIPLE: tl.constexpr,
    ONE_TILE: tl.constexpr,          # BLOCK_R >= R
    OUT_STAGES: tl.constexpr,
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
            ACTIVATION, DERIVATIVE, DTYPE, EVEN_R,
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
                    ACTIVATION, DERIVATIVE, DTYPE, EVEN_R,
                )  # fmt: skip
                if dx_ptr is not None:
                    w_down = load_down_tile(
                        down_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
                    )
                    dx = tl.dot(dz, w_down.to(DTYPE), dx, input_precision=PRECISION)
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

    d_down = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    d_up = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)  # transposed: see below
    # The bias sums stay whole tiles until the end: a reduction across warps costs a barrier a step.
    dz_total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    dy_total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in range(first, last, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        # Whatever lies in the padding of dz and a reaches units that are not stored; rows beyond
        # the slice are zero.
        if down_ptr is not None or down_bias_ptr is not None:
            dz = load_units(dz_ptr, token, unit, stride_unit_token, last, bottleneck_size, EVEN_R)
        if down_ptr is not None:
            x = load_rows(x_ptr, token, feature, stride_x_token, last, hidden_size, EVEN_H)
            d_down = tl.dot(tl.trans(dz), x.to(DTYPE), d_down, input_precision=PRECISION)
        if down_bias_ptr is not None:
            dz_total += dz.to(tl.float32)
        if up_ptr is not None or up_bias_ptr is not None:
            dy = load_rows(dy_ptr, token, feature, stride_dy_token, last, hidden_size, EVEN_H)
        if up_ptr is not None:
            a = load_units(a_ptr, token, unit, stride_unit_token, last, bottleneck_size, EVEN_R)
            # A dy that is converted goes through shared memory as the second factor; as the first
            # it would meet the fault that `awaited` is about.
            d_up = tl.dot(tl.trans(a), dy.to(DTYPE), d_up, input_precision=PRECISION)
        if up_bias_ptr is not None:
            dy_total += dy.to(tl.float32)

    d_up = scaled(d_up, scaling_ptr, scale, feature[None, :], hidden_size, CHANNEL_SCALING)
    in_features = feature < hidden_size
    in_units = unit < bottleneck_size
    in_both = in_units[:, None] & in_features[None, :]
    weight = split.to(tl.int64) * hidden_size * bottleneck_size
    if down_ptr is not None:
        offsets = weight + unit[:, None] * hidden_size + feature[None, :]
        tl.store(down_ptr + offsets, d_down.to(down_ptr.dtype.element_ty), mask=in_both)
    if up_ptr is not None:
        offsets = weight + feature[None, :] * bottleneck_size + unit[:, None]
        tl.store(up_ptr + offsets, d_up.to(up_ptr.dtype.element_ty), mask=in_both)
    if down_bias_ptr is not None:
        if tl.program_id(0) == 0:
            total = tl.sum(dz_total, 0).to(down_bias_ptr.dtype.element_ty)
            tl.store(down_bias_ptr + split * bottleneck_size + unit, total, mask=in_units)
    if up_bias_ptr is not None:
        if tl.program_id(1) == 0:
            total = tl.sum(dy_total, 0)
            total = scaled(total, scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING)
            total = total.to(up_bias_ptr.dtype.element_ty)
            tl.store(up_bias_ptr + split * hidden_size + feature, total, mask=in_features)


@triton.jit
def sum_slices(part_ptr, offsets, mask, size, num_splits):
    """Sum the elements at `offsets`, [m, n], of S partial sums, which lie `size` elements apart, in
    their order, eight at a time.

    The eight are one load: ptxas leaves masked loads of an unrolled loop behind one another.
    """
    total = tl.zeros(offsets.shape, tl.float32)
    for start in range(0, num_splits, 8):
        split = start + tl.arange(0, 8)[:, None, None]
        part_ptrs = part_ptr + (split.to(tl.int64) * size + offsets[None, :, :])
        total += tl.sum(
            tl.load(part_ptrs, mask=(split < num_splits) & mask[None, :, :], other=0.0), 0
        )
    return total


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
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums in the order of the splits. Grid: feature blocks, unit blocks.

    d(scaling)[h] = sum_r G[h, r] W_up[h, r] + b_up[h] sum_t dy[t, h], equation (13), needs a whole
    row of G: if it is asked for, one program goes through all units.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    feature = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_features = feature < hidden_size
    d_scaling = tl.zeros((BLOCK_H,), tl.float32)
    weight_size = hidden_size * bottleneck_size

    if d_scaling_ptr is None:
        first = tl.program_id(1) * BLOCK_R
        last = tl.minimum(first + BLOCK_R, bottleneck_size)
    else:
        first, last = 0, bottleneck_size
    for start in range(first, last, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        in_units = unit < bottleneck_size
        mask = in_features[:, None] & in_units[None, :]
        if part_down_ptr is not None:
            offsets = unit[None, :] * hidden_size + feature[:, None]
            total = sum_slices(part_down_ptr, offsets, mask, weight_size, num_splits)
            tl.store(d_down_ptr + offsets, total.to(d_down_ptr.dtype.element_ty), mask=mask)
        if part_up_ptr is not None:
            offsets = feature[:, None] * bottleneck_size + unit[None, :]
            total = sum_slices(part_up_ptr, offsets, mask, weight_size, num_splits)
            if d_scaling_ptr is not None:
                w_up = tl.load(up_weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                d_scaling += tl.sum(total * w_up, 1)
            if d_up_ptr is not None:
                total = scaled(
                    total, scaling_ptr, scale, feature[:, None], hidden_size, CHANNEL_SCALING
                )
                tl.store(d_up_ptr + offsets, total.to(d_up_ptr.dtype.element_ty), mask=mask)
        if part_down_bias_ptr is not None:
            if tl.program_id(0) == 0:
                total_dz = sum_slices(
                    part_down_bias_ptr,
                    unit[None, :],
                    in_units[None, :],
                    bottleneck_size,
                    num_splits,
                )
                d_down_bias = tl.sum(total_dz, 0).to(d_down_bias_ptr.dtype.element_ty)
                tl.store(d_down_bias_ptr + unit, d_down_bias, mask=in_units)

    if part_up_bias_ptr is not None:
        if tl.program_id(1) == 0:
            total_dy = tl.sum(
                sum_slices(
                    part_up_bias_ptr,
                    feature[:, None],
                    in_features[:, None],
                    hidden_size,
                    num_splits,
                ),
                1,
            )  # of one column: its shape alone changes
            d_scaling += load_vector(up_bias_ptr, feature, hidden_size) * total_dy
            if d_up_bias_ptr is not None:
                d_up_bias = scaled(
                    total_dy, scaling_ptr, scale, feature, hidden_size, CHANNEL_SCALING
                )
                d_up_bias = d_up_bias.to(d_up_bias_ptr.dtype.element_ty)
                tl.store(d_up_bias_ptr + feature, d_up_bias, mask=in_features)
    if d_scaling_ptr is not None:
        tl.store(d_scaling_ptr + feature, d_scaling, mask=in_features)
