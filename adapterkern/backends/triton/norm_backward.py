"""Backward kernels of a norm behind the adapter, equations (19) to (22) of docs/math.md.

They make ds, the gradient of the sum, which takes the place of dy in the plain backward: the kernel
of the row-block form goes on to dz and dx, for the other forms `norm_rows_bwd_kernel` makes ds
alone. The gradients of the norm's parameters are fixed-order sums, so that repeated runs give the
same bits: each program adds up those of its rows, and `norm_bwd_sum_kernel` adds the programs'.
"""

import triton
import triton.language as tl

from adapterkern.backends.triton.backward import finished_units, store_dx
from adapterkern.backends.triton.norm import norm_factor, standardized
from adapterkern.backends.triton.tiles import (
    awaited,
    load_down_tile,
    load_rows,
    load_units,
    load_up_tile,
    scaled,
    store_rows,
)
from adapterkern.backends.triton.weight_gradients import sum_vector_slices


@triton.jit
def row_statistics(mean_ptr, rstd_ptr, token, num_tokens, LAYER: tl.constexpr):
    """mean and rstd of a row block, [BLOCK_T]; zeros for tokens that are not there."""
    in_tokens = token < num_tokens
    rstd = tl.load(rstd_ptr + token, mask=in_tokens, other=0.0)
    mean = tl.zeros_like(rstd)
    if LAYER:
        mean = tl.load(mean_ptr + token, mask=in_tokens, other=0.0)
    return mean, rstd


@triton.jit
def norm_tiles(
    d_normed_ptr, stream_ptr, weight_ptr, mean, rstd, token, feature,
    num_tokens, hidden_size, stride_d_normed_token, stride_stream_token,
    LAYER: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """d_normed, xhat and g = d_normed (w + offset) of a tile, equations (18) and (19)."""
    d_normed = load_rows(
        d_normed_ptr, token, feature, stride_d_normed_token, num_tokens, hidden_size, EVEN_H
    ).to(tl.float32)
    s = load_rows(
        stream_ptr, token, feature, stride_stream_token, num_tokens, hidden_size, EVEN_H
    ).to(tl.float32)
    xhat = standardized(s, mean, rstd, LAYER)
    g = d_normed
    if weight_ptr is not None:
        g = d_normed * norm_factor(weight_ptr, feature, hidden_size, WEIGHT_OFFSET)[None, :]
    return d_normed, xhat, g


@triton.jit
def row_means(
    d_normed_ptr, stream_ptr, weight_ptr, mean, rstd, token,
    num_tokens, hidden_size, stride_d_normed_token, stride_stream_token,
    LAYER: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, EVEN_H: tl.constexpr,
    NORM_STAGES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The means over the features of g and of g xhat, [BLOCK_T], which equation (20) subtracts; of
    an RMSNorm the first is zero."""
    g_sum = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)  # whole tiles: one reduction, not one a step
    g_xhat_sum = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for start in tl.range(0, hidden_size, BLOCK_H, num_stages=NORM_STAGES):
        feature = start + tl.arange(0, BLOCK_H)
        _, xhat, g = norm_tiles(
            d_normed_ptr, stream_ptr, weight_ptr, mean, rstd, token, feature,
            num_tokens, hidden_size, stride_d_normed_token, stride_stream_token,
            LAYER, WEIGHT_OFFSET, EVEN_H,
        )  # fmt: skip
        if LAYER:
            g_sum += g
        g_xhat_sum += g * xhat
    return tl.sum(g_sum, 1) / hidden_size, tl.sum(g_xhat_sum, 1) / hidden_size


@triton.jit
def sum_gradient(
    g, xhat, rstd, mean_g, mean_g_xhat, d_stream_ptr, token, feature,
    num_tokens, hidden_size, stride_d_stream_token, LAYER: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """ds of a tile in float32, equation (20)."""
    ds = g - xhat * mean_g_xhat[:, None]
    if LAYER:
        ds -= mean_g[:, None]
    ds *= rstd[:, None]
    if d_stream_ptr is not None:
        d_stream = load_rows(
            d_stream_ptr, token, feature, stride_d_stream_token, num_tokens, hidden_size, EVEN_H
        )
        ds += d_stream.to(tl.float32)
    return ds


@triton.jit
def add_to_partials(
    d_normed, xhat, part_weight_ptr, part_bias_ptr, feature, block, hidden_size,
    CAST: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Add a tile's part of equations (21) and (22) to this program's sums, [H] float32 each, which
    the program's first row block begins."""
    if CAST:
        xhat = xhat.to(STREAM).to(tl.float32)
    # One reduction for both: each is a few barriers.
    d_weight, d_bias = tl.reduce((d_normed * xhat, d_normed), 0, sum_of_pairs)
    partial = tl.program_id(0).to(tl.int64) * hidden_size + feature
    in_features = feature < hidden_size
    # A vector, since the interpreter of Triton 3.9 takes no mask with one truth value in it.
    known = in_features & (block + tl.zeros_like(feature) > tl.program_id(0))
    if part_weight_ptr is not None:
        d_weight += tl.load(part_weight_ptr + partial, mask=known, other=0.0)
        tl.store(part_weight_ptr + partial, d_weight, mask=in_features)
    if part_bias_ptr is not None:
        d_bias += tl.load(part_bias_ptr + partial, mask=known, other=0.0)
        tl.store(part_bias_ptr + partial, d_bias, mask=in_features)


@triton.jit
def sum_of_pairs(a, b, c, d):
    """(a, b) + (c, d)."""
    return a + c, b + d


@triton.jit(do_not_specialize=["num_tokens", "bottleneck_size", "stride_unit_token"])
def bottleneck_norm_bwd_dx_kernel(
    d_normed_ptr, stream_ptr, d_stream_ptr,         # in: [T, H]; the last one or None
    weight_ptr, mean_ptr, rstd_ptr,                 # in: [H] or None, [T] or None, [T]
    z_ptr, down_weight_ptr, up_weight_ptr,          # in: [T, R], [R, H], [H, R]
    scaling_ptr, scale,                             # in: [1] or [H], or a float, or neither: 1
    ds_ptr, dx_ptr, dz_ptr, a_ptr,                  # out: [T, H]; [T, H], [T, R], [T, R] or None
    part_weight_ptr, part_bias_ptr,                 # out or None: [programs, H] float32
    num_tokens, hidden_size, bottleneck_size,
    stride_d_normed_token, stride_stream_token, stride_d_stream_token, stride_unit_token,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ADD_INPUT: tl.constexpr, CHANNEL_SCALING: tl.constexpr,
    LAYER: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, CAST: tl.constexpr, STREAM: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr, R_MULTIPLE: tl.constexpr,
    NORM_STAGES: tl.constexpr, INTO_STAGES: tl.constexpr, OUT_STAGES: tl.constexpr,  # of the loops
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,  # BLOCK_R >= R
):  # fmt: skip
    """The row-block form: ds, then dz = (du W_up) * act'(z) with du = scaling * ds, then
    dx = dz W_down (+ ds). As many programs as the plan lets run at once take the row blocks.

    Per token: read d_normed and the stream (H each) twice, d_stream (H) and z (R), write ds (H),
    read it (H), write dx (H), dz and a (R each); what is read again comes from L2, which got it
    last, as in the forward. `store_normed` says why ds is read as it was written.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE  # shows the compiler its vectors
    unit = tl.arange(0, BLOCK_R)
    steps = tl.cdiv(hidden_size, BLOCK_H)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        token = block * BLOCK_T + tl.arange(0, BLOCK_T)
        z = load_units(z_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
        mean, rstd = row_statistics(mean_ptr, rstd_ptr, token, num_tokens, LAYER)
        mean_g, mean_g_xhat = row_means(
            d_normed_ptr, stream_ptr, weight_ptr, mean, rstd, token,
            num_tokens, hidden_size, stride_d_normed_token, stride_stream_token,
            LAYER, WEIGHT_OFFSET, EVEN_H, NORM_STAGES, BLOCK_T, BLOCK_H,
        )  # fmt: skip
        da = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for step in tl.range(0, steps, num_stages=INTO_STAGES):
            feature = (steps - 1 - step) * BLOCK_H + tl.arange(0, BLOCK_H)
            d_normed, xhat, g = norm_tiles(
                d_normed_ptr, stream_ptr, weight_ptr, mean, rstd, token, feature,
                num_tokens, hidden_size, stride_d_normed_token, stride_stream_token,
                LAYER, WEIGHT_OFFSET, EVEN_H,
            )  # fmt: skip
            ds = sum_gradient(
                g, xhat, rstd, mean_g, mean_g_xhat, d_stream_ptr, token, feature,
                num_tokens, hidden_size, stride_d_stream_token, LAYER, EVEN_H,
            ).to(STREAM)  # fmt: skip
            store_rows(
                ds_ptr, ds, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H, KEEP=True
            )
            w_up = load_up_tile(
                up_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
            )
            if CHANNEL_SCALING:  # as `bottleneck_gradient` does
                w_up = scaled(w_up, scaling_ptr, scale, feature[:, None], hidden_size, True)
            da = awaited(tl.dot(ds.to(DTYPE), w_up.to(DTYPE), da, input_precision=PRECISION))
            add_to_partials(
                d_normed, xhat, part_weight_ptr, part_bias_ptr, feature,
                block, hidden_size, CAST, STREAM,
            )  # fmt: skip
        if not CHANNEL_SCALING:
            da = scaled(da, scaling_ptr, scale, unit[None, :], bottleneck_size, False)
        dz = finished_units(
            z, da, z_ptr, dz_ptr, a_ptr, token, unit, stride_unit_token, num_tokens,
            bottleneck_size, ACTIVATION, GRADIENT, DTYPE, EVEN_R,
        )  # fmt: skip
        tl.debug_barrier()  # for ds, and for the partial sums of the next row block
        if dx_ptr is not None:
            for start in tl.range(0, hidden_size, BLOCK_H, num_stages=OUT_STAGES):
                feature = start + tl.arange(0, BLOCK_H)
                w_down = load_down_tile(
                    down_weight_ptr, unit, feature, bottleneck_size, hidden_size, EVEN_R, EVEN_H
                )
                dx = tl.dot(dz, w_down.to(DTYPE), input_precision=PRECISION)
                store_dx(
                    dx, token, feature, ds_ptr, dx_ptr, num_tokens, hidden_size, hidden_size,
                    ADD_INPUT, EVEN_H,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def norm_rows_bwd_kernel(
    d_normed_ptr, stream_ptr, d_stream_ptr,  # in: [T, H]; the last two or None
    weight_ptr, mean_ptr, rstd_ptr,          # in or None: [H], [T], [T]
    ds_ptr,                                  # out or None: [T, H]
    part_weight_ptr, part_bias_ptr,          # out or None: [programs, H] float32
    num_tokens, hidden_size,
    stride_d_normed_token, stride_stream_token, stride_d_stream_token,
    LAYER: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, CAST: tl.constexpr, STREAM: tl.constexpr,
    EVEN_H: tl.constexpr, NORM_STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """ds and the sums of the norm's parameters, as above: what nobody asked for is left out, and
    then so are the reads for it."""
    steps = tl.cdiv(hidden_size, BLOCK_H)
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        token = block * BLOCK_T + tl.arange(0, BLOCK_T)
        if stream_ptr is not None:
            mean, rstd = row_statistics(mean_ptr, rstd_ptr, token, num_tokens, LAYER)
        if ds_ptr is not None:
            mean_g, mean_g_xhat = row_means(
                d_normed_ptr, stream_ptr, weight_ptr, mean, rstd, token,
                num_tokens, hidden_size, stride_d_normed_token, stride_stream_token,
                LAYER, WEIGHT_OFFSET, EVEN_H, NORM_STAGES, BLOCK_T, BLOCK_H,
            )  # fmt: skip
        for step in tl.range(0, steps, num_stages=NORM_STAGES):
            feature = (steps - 1 - step) * BLOCK_H + tl.arange(0, BLOCK_H)
            if stream_ptr is not None:
                d_normed, xhat, g = norm_tiles(
                    d_normed_ptr, stream_ptr, weight_ptr, mean, rstd, token, feature,
                    num_tokens, hidden_size, stride_d_normed_token, stride_stream_token,
                    LAYER, WEIGHT_OFFSET, EVEN_H,
                )  # fmt: skip
            else:
                d_normed = load_rows(
                    d_normed_ptr, token, feature, stride_d_normed_token, num_tokens, hidden_size,
                    EVEN_H,
                ).to(tl.float32)  # fmt: skip
                xhat = d_normed  # nobody asks for it
            if ds_ptr is not None:
                ds = sum_gradient(
                    g, xhat, rstd, mean_g, mean_g_xhat, d_stream_ptr, token, feature,
                    num_tokens, hidden_size, stride_d_stream_token, LAYER, EVEN_H,
                )  # fmt: skip
                store_rows(
                    ds_ptr, ds, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H,
                    KEEP=True,
                )  # fmt: skip
            add_to_partials(
                d_normed, xhat, part_weight_ptr, part_bias_ptr, feature,
                block, hidden_size, CAST, STREAM,
            )  # fmt: skip
        tl.debug_barrier()  # for the partial sums of the next row block


@triton.jit(do_not_specialize=["num_partials"])
def norm_bwd_sum_kernel(
    part_weight_ptr, part_bias_ptr,  # in or None: [programs, H] float32
    d_weight_ptr, d_bias_ptr,        # out or None: [H]
    hidden_size, num_partials, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Adds the programs' sums, as `sum_slices` orders them. Grid: feature blocks."""
    feature = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_features = feature < hidden_size
    if part_weight_ptr is not None:
        total = sum_vector_slices(
            part_weight_ptr, feature, in_features, hidden_size, num_partials, BLOCK_S
        )
        tl.store(d_weight_ptr + feature, total.to(d_weight_ptr.dtype.element_ty), mask=in_features)
    if part_bias_ptr is not None:
        total = sum_vector_slices(
            part_bias_ptr, feature, in_features, hidden_size, num_partials, BLOCK_S
        )
        tl.store(d_bias_ptr + feature, total.to(d_bias_ptr.dtype.element_ty), mask=in_features)
