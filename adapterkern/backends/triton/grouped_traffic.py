"""The bytes that the kernels of many adapters move, as `traffic` has them for those of one.

Of the weights, every adapter that some token takes comes from memory once; each of its row blocks
loads them anew, from L2. `order` and `tiles` are 4 bytes a token and 12 a tile. Programs of a grid
without a tile end at once, and count as nothing.
"""

from adapterkern.backends.traffic import ENTRY, INDEX, Batch, Traffic, misses
from adapterkern.backends.triton.grouped_gradient_launches import SUM, Chunks
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
    cdiv,
    gradient_stages,
)
from adapterkern.backends.triton.traffic import FLOAT, into_flight, out_flight

ROW_PROGRAMS = 4  # of the kernels by row on an SM at once: four warps each, of 128 registers


def forward(
    problem: Problem,
    plan: RowBlock | Split,
    device: Device,
    batch: Batch,
    element: int = 2,
    save: bool = True,
) -> list[Traffic]:
    """The kernels of y; with `save` z is stored for the backward."""
    kept = problem.num_tokens * problem.bottleneck_size * element if save else 0
    if isinstance(plan, RowBlock):
        return [_tiled(problem, plan.kernel, device, batch, element, "grouped_fwd_kernel", 0, kept)]
    return _by_row(problem, plan, batch, element, kept)


def input_gradient(
    problem: Problem,
    plan: LaunchConfig | Split,
    device: Device,
    batch: Batch,
    element: int = 2,
) -> list[Traffic]:
    """The kernels of dz and dx, which read z and store dz and a for the weight gradients."""
    tokens, hidden, bottleneck = problem[:3]
    units = batch.taken * bottleneck * element
    if isinstance(plan, LaunchConfig):
        name = "grouped_bwd_dx_kernel"
        return [_tiled(problem, plan, device, batch, element, name, units, 2 * units)]
    narrow, widen = plan.narrow, plan.widen
    rows, weight = tokens * hidden * element, hidden * bottleneck * element
    taken, unit_blocks = batch.taken * hidden * element, cdiv(bottleneck, narrow.block_r)
    first = Traffic(
        "grouped_bwd_dx_kernel",
        max(1, batch.row_blocks(narrow.block_t)) * unit_blocks,
        narrow.blocks_per_sm,
        memory=taken + batch.used * weight + 3 * units,
        loads=taken * unit_blocks + batch.row_blocks(narrow.block_t) * weight + units,
        stores=2 * units,
        in_flight=into_flight(narrow, device, element),
        flops=2.0 * narrow.block_t * batch.row_blocks(narrow.block_t) * hidden * bottleneck,
    )
    blocks = batch.row_blocks(widen.block_t)
    second = Traffic(
        "grouped_bwd_wide_dx_kernel",
        (blocks + cdiv(batch.rest, widen.block_t)) * cdiv(hidden, plan.features_per_program),
        widen.blocks_per_sm,
        memory=(1 + misses(rows + units)) * rows + batch.used * weight,
        loads=rows + blocks * weight + units * cdiv(hidden, widen.block_h),
        stores=rows,
        in_flight=out_flight(widen, device, element),
        flops=2.0 * widen.block_t * blocks * hidden * bottleneck,
    )
    return [first, second]


def weight_gradients(
    problem: Problem,
    config: LaunchConfig,
    chunks: Chunks,
    device: Device,
    batch: Batch,
    element: int = 2,
) -> list[Traffic]:
    """The products of each segment, and what adds up the slots that have several, or writes zeros
    where there is none."""
    hidden, bottleneck = problem.hidden_size, problem.bottleneck_size
    segments = batch.segments(chunks.rows)
    whole = sum(count == 1 for count in segments)
    parts, unused = sum(c for c in segments if c > 1), segments.count(0)
    shared = len(segments) - whole - unused
    weights = 2 * hidden * bottleneck
    feature_blocks, unit_blocks = cdiv(hidden, config.block_h), cdiv(bottleneck, config.block_r)
    rows = 2 * batch.taken * hidden * element
    units = 2 * batch.taken * bottleneck * element
    products = Traffic(
        "grouped_bwd_dw_kernel",
        max(1, feature_blocks * unit_blocks * (whole + parts)),
        config.blocks_per_sm,
        memory=rows + units + whole * weights * element,
        loads=rows * unit_blocks + units * feature_blocks + INDEX * batch.taken * feature_blocks,
        stores=whole * weights * element + parts * weights * FLOAT,
        in_flight=(gradient_stages(config, device, 2 * element, 2 * element) - 1)
        * (2 * (config.block_h + config.block_r) * config.block_t * element),
        flops=4.0 * batch.taken * hidden * bottleneck,
    )
    written = shared + unused
    total = Traffic(
        "grouped_bwd_dw_sum_kernel",
        max(1, written) * 2 * cdiv(hidden, SUM.block_h) * cdiv(bottleneck, SUM.block_r),
        8,  # as many as an SM holds
        memory=written * weights * element,
        loads=parts * weights * FLOAT + 2 * INDEX * len(segments),
        stores=written * weights * element,
        in_flight=SUM.block_t * SUM.block_h * SUM.block_r * FLOAT,
    )
    return [products, total]


def _tiled(
    problem: Problem,
    config: LaunchConfig,
    device: Device,
    batch: Batch,
    element: int,
    name: str,
    read: int,
    kept: int,
) -> Traffic:
    """y, or dz and dx, in the row blocks of all tiles; `read` and `kept` are the bytes of
    bottleneck tensors beside the rows.
    """
    tokens, hidden, bottleneck = problem[:3]
    blocks, free = batch.row_blocks(config.block_t), cdiv(batch.rest, config.block_t)
    weights = 2 * hidden * bottleneck * element
    rows, taken = tokens * hidden * element, batch.taken * hidden * element
    routing = INDEX * tokens + ENTRY * (blocks + free)
    # As in `traffic`, but that a row block may have fewer rows than it has room for.
    running = min(blocks, config.blocks_per_sm * device.num_sms)
    again = misses(running * taken / max(1, blocks))
    # More units than a tile read x for each, and a comes back with each tile of features.
    unit_tiles = cdiv(bottleneck, config.block_r)
    units = batch.taken * bottleneck * element if unit_tiles > 1 else 0
    return Traffic(
        name,
        blocks + free,
        config.blocks_per_sm,
        memory=2 * rows + again * unit_tiles * taken + batch.used * weights + routing + read + kept,
        loads=rows + unit_tiles * taken + blocks * weights + routing + read
        + units * cdiv(hidden, config.block_h),
        stores=rows + kept + units,
        in_flight=min(into_flight(config, device, element), out_flight(config, device, element)),
        flops=4.0 * config.block_t * blocks * hidden * bottleneck,
    )  # fmt: skip


def _by_row(problem: Problem, plan: Split, batch: Batch, element: int, kept: int) -> list[Traffic]:
    """Each token loads the weights of its adapter, tiles of which are under way as a whole."""
    tokens, hidden, bottleneck = problem[:3]
    narrow, widen = plan.narrow, plan.widen
    rows, taken = tokens * hidden * element, batch.taken * hidden * element
    weight, slots = hidden * bottleneck * element, INDEX * tokens
    sums = plan.num_splits * batch.taken * bottleneck * FLOAT
    unit_blocks, feature_blocks = cdiv(bottleneck, narrow.block_r), cdiv(hidden, widen.block_h)
    first = Traffic(
        "grouped_fwd_row_down_kernel",
        max(1, batch.taken) * unit_blocks * plan.num_splits,
        ROW_PROGRAMS,
        memory=taken + batch.used * weight + slots,
        loads=taken * unit_blocks + batch.taken * weight + slots,
        stores=sums,
        in_flight=narrow.block_h * narrow.block_r * element,
    )
    second = Traffic(
        "grouped_fwd_row_up_kernel",
        tokens * feature_blocks,
        ROW_PROGRAMS,
        memory=(1 + misses(rows + sums)) * rows + batch.used * weight + kept,
        loads=rows + batch.taken * weight + sums * feature_blocks + slots,
        stores=rows + kept,
        in_flight=widen.block_h * widen.block_r * element,
    )
    return [first, second]
