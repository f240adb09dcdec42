"""Forward kernels of many adapters: each token takes the weights of its own slot.

Two forms of y = residual + skip + s_i (act(x D_i^T + b_i) U_i^T + c_i), i the slot of a token:

- tiled: a program owns up to BLOCK_T tokens of one slot, which `order` names, and runs the products
  of the row block with pointers moved to that slot. Rows are gathered in the load and scattered in
  the store; nothing is sorted in memory.
- by row: programs own one token each and slices of the features, and multiply without tensor cores.
  Few tokens with an adapter each move little but weights, which all SMs then read side by side.

Tokens without an adapter, and those of slots without units, get residual + skip in the same launch.
"""

import triton
import triton.language as tl

from adapterkern.backends.triton.forward import down_projection, output_tile, up_bias_product
from adapterkern.backends.triton.grouped_tiles import moved, rank_of, row_block_of, tokens_of
from adapterkern.backends.triton.tiles import (
    existing_units,
    load_down_tile,
    load_units,
    load_up_tile,
    load_vector,
    plus_product,
    store_rows,
    store_units,
)


@triton.jit
def load_slot_up_tile(
    ptr, unit, feature, rank, bottleneck_size, hidden_size,
    VECTOR: tl.constexpr, EVEN_R: tl.constexpr, EVEN_H: tl.constexpr,
):  # fmt: skip
    """Load [BLOCK_H, BLOCK_R] of a slot's U [H, R]; zeros out of bounds and from `rank` on.

    A rank that divides by VECTOR ends with one. In any other a mask that ends with the rank would
    split every vector into its elements, so it ends with the vector, and what that has beyond the
    rank is put out before anything computes with it.
    """
    whole = (rank + VECTOR - 1) // VECTOR * VECTOR
    tile = load_up_tile(ptr, unit, feature, whole, hidden_size, EVEN_R, EVEN_H, bottleneck_size)
    if VECTOR > 1:
        tile = tl.where(unit[None, :] < rank, tile, 0.0)
    return tile


@triton.jit
def slot_bottleneck(
    x_ptr, down_weight_ptr, down_bias_ptr, z_ptr, token, unit, last,
    num_tokens, hidden_size, rank, bottleneck_size, stride_x_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """a = act(z) of one tile of units; z, which is zero from `rank` on, is stored for all of R."""
    z = down_projection(
        x_ptr, down_weight_ptr, token, unit, 0, last,
        num_tokens, hidden_size, rank, stride_x_token,
        DTYPE, PRECISION, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    z += load_vector(down_bias_ptr, unit, rank)[None, :]
    z = existing_units(z, unit, rank, EVEN_R).to(DTYPE)
    if z_ptr is not None:
        store_units(z_ptr, z, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R)
    return ACTIVATION(z.to(tl.float32)).to(DTYPE)


@triton.jit
def part_bottleneck(
    x_ptr, down_weight_ptr, down_bias_ptr, z_ptr, a_ptr, token,
    num_tokens, hidden_size, rank, bottleneck_size, stride_x_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr, EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """a = act(z) of all units; nothing where they are more than a tile, and it is left in a_ptr."""
    if ONE_TILE:
        return slot_bottleneck(
            x_ptr, down_weight_ptr, down_bias_ptr, z_ptr, token, tl.arange(0, BLOCK_R), hidden_size,
            num_tokens, hidden_size, rank, bottleneck_size, stride_x_token, stride_unit_token,
            ACTIVATION, DTYPE, PRECISION, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
        )  # fmt: skip
    else:
        for first_unit in range(0, bottleneck_size, BLOCK_R):
            unit = first_unit + tl.arange(0, BLOCK_R)
            last = tl.where(first_unit < rank, hidden_size, 0)  # no product beyond the rank
            of_tile = slot_bottleneck(
                x_ptr, down_weight_ptr, down_bias_ptr, z_ptr, token, unit, last,
                num_tokens, hidden_size, rank, bottleneck_size, stride_x_token, stride_unit_token,
                ACTIVATION, DTYPE, PRECISION, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
            )  # fmt: skip
            store_units(
                a_ptr, of_tile, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
            )
        tl.debug_barrier()  # `norm.store_normed` says why this is enough


@triton.jit
def store_slot_rows(
    a, a_ptr, token, unit, rank, up_weight_ptr, up_bias_ptr, scaling_ptr,
    x_ptr, residual_ptr, skip_ptr, y_ptr, num_tokens, hidden_size, bottleneck_size,
    stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, ADD_INPUT: tl.constexpr,
    VECTOR: tl.constexpr, ONE_TILE: tl.constexpr, EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    OUT_STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y of a part of a tile, from a = act(z), which is in a_ptr where it has more than one tile."""
    steps = tl.cdiv(hidden_size, BLOCK_H)
    for step in tl.range(0, steps, num_stages=OUT_STAGES):  # x backwards, as in the row block
        feature = (steps - 1 - step) * BLOCK_H + tl.arange(0, BLOCK_H)
        u = up_bias_product(up_bias_ptr, feature, hidden_size, DTYPE, EVEN_H, BLOCK_T, BLOCK_H)
        if ONE_TILE:
            w_up = load_slot_up_tile(
                up_weight_ptr, unit, feature, rank, bottleneck_size, hidden_size,
                VECTOR, EVEN_R, EVEN_H,
            )  # fmt: skip
            u = tl.dot(a, tl.trans(w_up).to(DTYPE), u, input_precision=PRECISION)
        else:
            for first_unit in range(0, rank, BLOCK_R):
                unit = first_unit + tl.arange(0, BLOCK_R)
                of_tile = load_units(
                    a_ptr, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
                )
                w_up = load_slot_up_tile(
                    up_weight_ptr, unit, feature, rank, bottleneck_size, hidden_size,
                    VECTOR, EVEN_R, EVEN_H,
                )  # fmt: skip
                u = plus_product(u, of_tile, tl.trans(w_up).to(DTYPE), PRECISION)
        y = output_tile(
            u, token, feature,
            x_ptr, residual_ptr, skip_ptr, up_bias_ptr, scaling_ptr, None,
            num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
            DTYPE, ADD_INPUT, False, EVEN_H,
        )  # fmt: skip
        store_rows(y_ptr, y, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)


@triton.jit
def rows_without_adapter(
    token, x_ptr, residual_ptr, skip_ptr, y_ptr, z_ptr,
    num_tokens, hidden_size, bottleneck_size,
    stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
    DTYPE: tl.constexpr, ADD_INPUT: tl.constexpr, EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = residual + skip, and z = 0."""
    if z_ptr is not None:
        for first_unit in range(0, bottleneck_size, BLOCK_R):
            unit = first_unit + tl.arange(0, BLOCK_R)
            zeros = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            store_units(
                z_ptr, zeros, token, unit, stride_unit_token, num_tokens, bottleneck_size, EVEN_R
            )
    for start in range(0, hidden_size, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        y = output_tile(
            tl.zeros((BLOCK_T, BLOCK_H), tl.float32), token, feature,
            x_ptr, residual_ptr, skip_ptr, None, None, None,
            num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
            DTYPE, ADD_INPUT, False, EVEN_H,
        )  # fmt: skip
        store_rows(y_ptr, y, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)


@triton.jit(do_not_specialize=["num_tokens", "slots", "bottleneck_size", "stride_unit_token"])
def grouped_fwd_kernel(
    x_ptr, down_weights_ptr, up_weights_ptr,  # in: [T, H], [S, R, H], [S, H, R]
    down_biases_ptr, up_biases_ptr,           # in or None: [S, R], [S, H]
    residual_ptr, skip_ptr,                   # in or None: [T, H], [T, H]
    scalings_ptr, ranks_ptr,                  # in or None: [S], [S]
    order_ptr, tiles_ptr,                     # in: the routing
    y_ptr, z_ptr, a_ptr,                      # out: [T, H], [T, R] or None; [T, R] if not ONE_TILE
    num_tokens, slots, hidden_size, bottleneck_size,
    stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    EVEN_H: tl.constexpr, EVEN_R: tl.constexpr,  # sizes, and ranks, that need no mask
    R_MULTIPLE: tl.constexpr,                    # divides R
    ONE_TILE: tl.constexpr,                      # BLOCK_R >= R
    OUT_STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The tiled form. Grid: the parts of all tiles that so many tokens can take.

    Per token: read x (H) twice, residual and skip if given (H each), write y (H) and z (R), as the
    row block of one adapter; and 4 bytes of `order`. With more units than a tile has, x is read
    once a tile of units, and a = act(z) waits in memory, from which this program alone reads it.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE  # shows the compiler its vectors
    slot, row, last = row_block_of(tiles_ptr, tl.program_id(0), BLOCK_T)
    if slot < 0:
        return
    token = tokens_of(order_ptr, row, last, num_tokens)
    rank = rank_of(slot, ranks_ptr, slots, bottleneck_size)
    if rank == 0:
        rows_without_adapter(
            token, x_ptr, residual_ptr, skip_ptr, y_ptr, z_ptr,
            num_tokens, hidden_size, bottleneck_size,
            stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
            DTYPE, ADD_INPUT, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
        )  # fmt: skip
        return
    down_weight_ptr = moved(down_weights_ptr, slot, bottleneck_size * hidden_size)
    up_weight_ptr = moved(up_weights_ptr, slot, bottleneck_size * hidden_size)
    down_bias_ptr = moved(down_biases_ptr, slot, bottleneck_size)
    up_bias_ptr = moved(up_biases_ptr, slot, hidden_size)
    scaling_ptr = moved(scalings_ptr, slot, 1)
    unit = tl.arange(0, BLOCK_R)
    a = part_bottleneck(
        x_ptr, down_weight_ptr, down_bias_ptr, z_ptr, a_ptr, token,
        num_tokens, hidden_size, rank, bottleneck_size, stride_x_token, stride_unit_token,
        ACTIVATION, DTYPE, PRECISION, ONE_TILE, EVEN_H, EVEN_R, BLOCK_T, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    # A rank of whole vectors, as nearly every one is, has the loop of the row block; a ragged one a
    # loop of a fifth more instructions.
    if R_MULTIPLE > 1 and not EVEN_R and rank % R_MULTIPLE > 0:
        store_slot_rows(
            a, a_ptr, token, unit, rank, up_weight_ptr, up_bias_ptr, scaling_ptr,
            x_ptr, residual_ptr, skip_ptr, y_ptr, num_tokens, hidden_size, bottleneck_size,
            stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
            DTYPE, PRECISION, ADD_INPUT, R_MULTIPLE, ONE_TILE, EVEN_H, EVEN_R,
            OUT_STAGES, BLOCK_T, BLOCK_H, BLOCK_R,
        )  # fmt: skip
    else:
        rank = rank // R_MULTIPLE * R_MULTIPLE
        store_slot_rows(
            a, a_ptr, token, unit, rank, up_weight_ptr, up_bias_ptr, scaling_ptr,
            x_ptr, residual_ptr, skip_ptr, y_ptr, num_tokens, hidden_size, bottleneck_size,
            stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
            DTYPE, PRECISION, ADD_INPUT, 1, ONE_TILE, EVEN_H, EVEN_R,
            OUT_STAGES, BLOCK_T, BLOCK_H, BLOCK_R,
        )  # fmt: skip


@triton.jit
def exact(tile, DTYPE: tl.constexpr):
    """Operands of a product without tensor cores: rounded as those of one with, in float32."""
    return tile.to(DTYPE).to(tl.float32)


@triton.jit
def partial_offsets(split, token, unit, rank, num_tokens, stride_unit_token):
    """Offsets and mask of one token's units in the [splits, T, R] partial sums of z, in vectors as
    `tiles.unit_offsets` has them: what is between the rank and the mask's end is to be put out.
    """
    row = num_tokens.to(tl.int64) * split + token
    mask = unit < (rank + 7) // 8 * 8
    return row * (stride_unit_token // 8 * 8) + unit, mask


@triton.jit(do_not_specialize=["num_tokens", "slots", "bottleneck_size", "stride_unit_token"])
def grouped_fwd_row_down_kernel(
    x_ptr, down_weights_ptr, ranks_ptr, token_slots_ptr,  # in: [T, H], [S, R, H], [S] or None, [T]
    partial_ptr,                                          # out: [splits, T, R] float32
    num_tokens, slots, hidden_size, bottleneck_size, features_per_split,
    stride_x_token, stride_unit_token,
    DTYPE: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """By row, first half: the sum of z over one slice of H. Grid: tokens, unit blocks, splits.

    Elements are added up apart, and reduced once. Units from the rank on are neither read nor
    written.
    """
    token, first_unit, split = tl.program_id(0), tl.program_id(1) * BLOCK_R, tl.program_id(2)
    slot = tl.load(token_slots_ptr + token)
    rank = rank_of(slot, ranks_ptr, slots, bottleneck_size)
    if first_unit >= rank:
        return
    unit = first_unit + tl.arange(0, BLOCK_R)
    down_weight_ptr = moved(down_weights_ptr, slot, bottleneck_size * hidden_size)
    x_ptr += token.to(tl.int64) * stride_x_token
    first = split * features_per_split
    last = tl.minimum(first + features_per_split, hidden_size)
    products = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for start in range(first, last, BLOCK_H):
        feature = start + tl.arange(0, BLOCK_H)
        w_down = load_down_tile(down_weight_ptr, unit, feature, rank, hidden_size, False, EVEN_H)
        x = tl.load(x_ptr + feature, mask=feature < hidden_size, other=0.0)
        products += exact(w_down, DTYPE) * exact(x, DTYPE)[None, :]
    offsets, mask = partial_offsets(split, token, unit, rank, num_tokens, stride_unit_token)
    tl.store(partial_ptr + offsets, tl.sum(products, 1), mask=mask)


@triton.jit
def row_bottleneck(
    partial_ptr, down_bias_ptr, token, unit, rank, num_tokens, stride_unit_token,
    NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """z of one token in float32, [BLOCK_R], zero from its rank on: the sums of all slices, which
    are all asked for before the first is added, in their order."""
    z = tl.zeros(unit.shape, tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        offsets, mask = partial_offsets(split, token, unit, rank, num_tokens, stride_unit_token)
        z += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    return tl.where(unit < rank, z + load_vector(down_bias_ptr, unit, rank), 0.0)


@triton.jit(do_not_specialize=["num_tokens", "slots", "bottleneck_size", "stride_unit_token"])
def grouped_fwd_row_up_kernel(
    partial_ptr, x_ptr, up_weights_ptr, down_biases_ptr, up_biases_ptr,  # in: as above
    residual_ptr, skip_ptr, scalings_ptr, ranks_ptr, token_slots_ptr,
    y_ptr, z_ptr,                                                        # out: [T, H]; [T, R], None
    num_tokens, slots, hidden_size, bottleneck_size,
    stride_x_token, stride_residual_token, stride_skip_token, stride_unit_token,
    ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, ADD_INPUT: tl.constexpr,
    EVEN_H: tl.constexpr, R_MULTIPLE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """By row, second half: y from the partial sums of z. Grid: tokens, tiles of features.

    A launch of its own, because every program needs all of z, to which every slice of H adds. Each
    sums it anew, from L2; the weights are asked for before, so that both come in one wait.
    """
    bottleneck_size = bottleneck_size // R_MULTIPLE * R_MULTIPLE  # shows the compiler its vectors
    index = tl.program_id(0)
    token = index + tl.arange(0, 1)
    feature = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.load(token_slots_ptr + index)
    rank = rank_of(slot, ranks_ptr, slots, bottleneck_size)
    up_weight_ptr = moved(up_weights_ptr, slot, bottleneck_size * hidden_size)
    down_bias_ptr = moved(down_biases_ptr, slot, bottleneck_size)
    u = tl.zeros((BLOCK_H,), tl.float32)
    units = rank
    if z_ptr is not None:  # zeros from the rank on are stored too
        units = bottleneck_size
    for first_unit in range(0, units, BLOCK_R):
        unit = first_unit + tl.arange(0, BLOCK_R)
        w_up = load_slot_up_tile(
            up_weight_ptr, unit, feature, rank, bottleneck_size, hidden_size,
            R_MULTIPLE, False, EVEN_H,
        )  # fmt: skip
        z = row_bottleneck(
            partial_ptr, down_bias_ptr, index, unit, rank, num_tokens, stride_unit_token,
            NUM_SPLITS,
        )  # fmt: skip
        z = z.to(DTYPE)
        if z_ptr is not None and tl.program_id(1) == 0:
            store_units(
                z_ptr, z[None, :], token, unit, stride_unit_token, num_tokens,
                bottleneck_size, False,
            )  # fmt: skip
        a = exact(ACTIVATION(z.to(tl.float32)), DTYPE)
        u += tl.sum(exact(w_up, DTYPE) * a[None, :], 1)
    if rank > 0:
        u += load_vector(moved(up_biases_ptr, slot, hidden_size), feature, hidden_size)
        if scalings_ptr is not None:
            u *= tl.load(scalings_ptr + slot).to(tl.float32)
    y = output_tile(
        u[None, :], token, feature,
        x_ptr, residual_ptr, skip_ptr, None, None, None,
        num_tokens, hidden_size, stride_x_token, stride_residual_token, stride_skip_token,
        DTYPE, ADD_INPUT, False, EVEN_H,
    )  # fmt: skip
    store_rows(y_ptr, y, token, feature, hidden_size, num_tokens, hidden_size, EVEN_H)
