"""Backward kernels of the tokens of many adapters: those of `backward` on the tiles of a routing,
equations (5), (9) and (12) of docs/math.md with the weights of the tile's slot.

x, y, z and their gradients lie in the order of the tokens, which are gathered and scattered. dz and
a, which the weight gradients alone read, lie in the order of the routing: there the rows of a slot
are side by side, so that no address waits for a token's number, for 63 rows a slot more of room.

A tile without an adapter has no units: its first loop makes no step, nothing of a weight is read,
and dx is what the second loop makes of zeros.
"""

import triton
import triton.language as tl

from adapterkern.backends.triton.backward import bottleneck_gradient, store_dx
from adapterkern.backends.triton.grouped_tiles import (
    moved,
    rank_of,
    row_block_of,
    scale_of,
    tokens_of,
)
from adapterkern.backends.triton.tiles import (
    existing_units,
    load_down_tile,
    load_units,
    plus_product,
    store_units,
)


@triton.jit(do_not_specialize=["num_tokens", "slots", "bottleneck_size", "stride_unit_token"])
def grouped_bwd_dx_kernel(
    dy_ptr, z_ptr, down_weights_ptr, up_weights_ptr,  # in: [T, H], [T, R], [S, R, H], [S, H, R]
    scalings_ptr, ranks_ptr,                          # in or None: [S], [S]
    order_ptr, tiles_ptr,                             # in: the routing's
    dx_ptr, dz_ptr, a_ptr,          # out or None: [T, H], [rows, R], [rows, R]
    num_tokens, slots, hidden_size, bottleneck_size, stride_dy_token, stride_unit_token,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ADD_INPUT: tl.constexpr,
    EVEN_H: tl.constexpr, R_MULTIPLE: tl.constexpr,
    OUT_STAGES: tl.constexpr,                                             # of the second loop
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz = s * (dy U) * act'(z) and a = act(z) for a block of units; with dx, whose block has to
    hold all of R, also dx = dz D (+ dy). Grid: row blocks of all tiles, unit blocks.

    Per token as `bottleneck_bwd_dx_kernel`, but for the weights: each row block reads its slot's.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE  # shows the compiler its vectors
    slot, row, last = row_block_of(tiles_ptr, tl.program_id(0), BLOCK_T)
    if slot < 0:
        return
    rank = rank_of(slot, ranks_ptr, slots, bottleneck_size)
    unit = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = tokens_of(order_ptr, row, last, num_tokens)
    up_weight_ptr = moved(up_weights_ptr, slot, hidden_size * bottleneck_size)
    down_weight_ptr = moved(down_weights_ptr, slot, hidden_size * bottleneck_size)

    z = load_units(z_ptr, token, unit, stride_unit_token, num_tokens, rank, False)
    if dx_ptr is not None or dz_ptr is not None:
        # Units of W_up from the rank to the end of a vector are read as they are: each makes a
        # column of da that is put out below.
        vectors = (rank + R_MULTIPLE - 1) // R_MULTIPLE * R_MULTIPLE
        features = tl.where(tl.program_id(1) * BLOCK_R < rank, hidden_size, 0)
        da = bottleneck_gradient(
            dy_ptr, up_weight_ptr, None, scale_of(scalings_ptr, slot, rank > 0),
            token, unit, 0, features,
            num_tokens, hidden_size, vectors, stride_dy_token,
            DTYPE, PRECISION, False, EVEN_H, False, BLOCK_T, BLOCK_H, BLOCK_R, bottleneck_size,
        )  # fmt: skip
        dz = existing_units(GRADIENT(z.to(tl.float32), da), unit, rank, False).to(DTYPE)
        if dz_ptr is not None:
            store_units(dz_ptr, dz, row, unit, stride_unit_token, last, rank, False)
    if a_ptr is not None:
        # Anew, from L2, as `backward.store_activation` says why.
        z = load_units(z_ptr, token, unit, stride_unit_token, num_tokens, rank, False)
        a = ACTIVATION(z.to(tl.float32))
        store_units(a_ptr, a, row, unit, stride_unit_token, last, rank, False)

    if dx_ptr is not None:
        steps = tl.cdiv(hidden_size, BLOCK_H)
        for step in tl.range(0, steps, num_stages=OUT_STAGES):
            feature = (steps - 1 - step) * BLOCK_H + tl.arange(0, BLOCK_H)
            w_down = load_down_tile(
                down_weight_ptr, unit, feature, rank, hidden_size, False, EVEN_H
            )
            dx = tl.dot(dz, w_down.to(DTYPE), input_precision=PRECISION)
            store_dx(
                dx, token, feature, dy_ptr, dx_ptr, num_tokens, hidden_size, stride_dy_token,
                ADD_INPUT, EVEN_H,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "slots", "bottleneck_size", "stride_unit_token"])
def grouped_bwd_wide_dx_kernel(
    dy_ptr, dz_ptr, down_weights_ptr, ranks_ptr,  # in: [T, H], [rows, R], [S, R, H], [S] or None
    order_ptr, tiles_ptr,                         # in: the routing's
    dx_ptr,                                       # out: [T, H]
    num_tokens, slots, hidden_size, bottleneck_size, features_per_program,
    stride_dy_token, stride_unit_token,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ADD_INPUT: tl.constexpr,
    EVEN_H: tl.constexpr, R_MULTIPLE: tl.constexpr,
    OUT_STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx from dz where no block of units holds all of R. Grid: row blocks of all tiles, slices of
    the features."""
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE
    slot, row, last = row_block_of(tiles_ptr, tl.program_id(0), BLOCK_T)
    if slot < 0:
        return
    rank = rank_of(slot, ranks_ptr, slots, bottleneck_size)
    token = tokens_of(order_ptr, row, last, num_tokens)
    down_weight_ptr = moved(down_weights_ptr, slot, hidden_size * bottleneck_size)
    first = tl.program_id(1) * features_per_program
    for start in tl.range(
        first, tl.minimum(first + features_per_program, hidden_size), BLOCK_H, num_stages=OUT_STAGES
    ):
        feature = start + tl.arange(0, BLOCK_H)
        dx = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for first_unit in range(0, rank, BLOCK_R):
            unit = first_unit + tl.arange(0, BLOCK_R)
            dz = load_units(dz_ptr, row, unit, stride_unit_token, last, rank, False)
            w_down = load_down_tile(
                down_weight_ptr, unit, feature, rank, hidden_size, False, EVEN_H
            )
            dx = plus_product(dx, dz, w_down.to(DTYPE), PRECISION)
        store_dx(
            dx, token, feature, dy_ptr, dx_ptr, num_tokens, hidden_size, stride_dy_token,
            ADD_INPUT, EVEN_H,
        )  # fmt: skip
