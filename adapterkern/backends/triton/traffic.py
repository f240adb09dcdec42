"""The bytes that each plan moves: one formula a kernel, in the kernels' own terms.

Sizes are those of uniform dtypes, `element` bytes each; optional tensors are absent but for what
training needs (z, both biases' gradients are too small to count).
"""

from adapterkern.backends.traffic import Traffic, misses
from adapterkern.backends.triton.launch_config import (
    SUM,
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
    WeightGradient,
    cdiv,
    gradient_stages,
    into_stages,
    out_stages,
    split_bytes,
)

FLOAT = 4  # bytes of a partial sum


def forward(
    problem: Problem, plan: RowBlock | Split, device: Device, element: int = 2, save: bool = True
) -> list[Traffic]:
    """The kernels of y; with `save` z is stored for the backward."""
    kept = problem.num_tokens * problem.bottleneck_size * element if save else 0
    names = ("bottleneck_fwd_kernel", "bottleneck_fwd_down_kernel", "bottleneck_fwd_up_kernel")
    return _tokens(problem, plan, device, element, names, read=0, kept=kept)


def input_gradient(
    problem: Problem, plan: RowBlock | Split, device: Device, element: int = 2
) -> list[Traffic]:
    """The kernels of dz and dx, which read z and store dz and a for the weight gradients."""
    bottleneck = problem.num_tokens * problem.bottleneck_size * element
    names = (
        "bottleneck_bwd_dx_kernel",
        "bottleneck_bwd_split_dz_kernel",
        "bottleneck_bwd_split_dx_kernel",
    )
    return _tokens(problem, plan, device, element, names, read=bottleneck, kept=2 * bottleneck)


def weight_gradients(
    problem: Problem, plan: WeightGradient, device: Device, element: int = 2
) -> list[Traffic]:
    """The products over the tokens, and the sum of their partial sums where there are several."""
    tokens, hidden, bottleneck = problem[:3]
    config, splits = plan.kernel, plan.num_splits
    feature_blocks, unit_blocks = cdiv(hidden, config.block_h), cdiv(bottleneck, config.block_r)
    weights = 2 * hidden * bottleneck
    partials = splits * weights * FLOAT if splits > 1 else 0
    gradients = weights * element
    rows = 2 * tokens * hidden * element
    units = 2 * tokens * bottleneck * element
    products = Traffic(
        "bottleneck_bwd_dw_kernel",
        feature_blocks * unit_blocks * splits,
        config.blocks_per_sm,
        # Blocks of the same tokens run side by side, so L2 serves all of them but the first.
        memory=rows + units + (0 if partials else gradients),
        loads=rows * unit_blocks + units * feature_blocks,
        stores=partials or gradients,
        in_flight=(gradient_stages(config, device, 2 * element, 2 * element) - 1)
        * (2 * (config.block_h + config.block_r) * config.block_t * element),
        flops=4.0 * tokens * hidden * bottleneck,
    )
    if not partials:
        return [products]
    total = Traffic(
        "bottleneck_bwd_dw_sum_kernel",
        2 * cdiv(hidden, SUM.block_h) * cdiv(bottleneck, SUM.block_r),
        16,  # as many as an SM holds
        memory=gradients,
        loads=partials,
        stores=gradients,
        in_flight=min(splits, SUM.block_t) * SUM.block_h * SUM.block_r * FLOAT,
    )
    return [products, total]


def _tokens(
    problem: Problem,
    plan: RowBlock | Split,
    device: Device,
    element: int,
    names: tuple[str, str, str],
    read: int,
    kept: int,
) -> list[Traffic]:
    """y, or dz and dx; `read` and `kept` are the bytes of bottleneck tensors beside the rows. What
    is read, z, is loaded for dz and, from L2, again for a.
    """
    if isinstance(plan, RowBlock):
        return [_row_block(problem, plan.kernel, device, element, names[0], read, kept)]
    return _split(problem, plan, device, element, names[1:], read, kept)


def _row_block(
    problem: Problem,
    config: LaunchConfig,
    device: Device,
    element: int,
    name: str,
    read: int,
    kept: int,
) -> Traffic:
    tokens, hidden, bottleneck = problem[:3]
    blocks = cdiv(tokens, config.block_t)
    rows, weights = tokens * hidden * element, 2 * hidden * bottleneck * element
    # Between the two reads of a tile lie half of the rows of all blocks that run at once, on the
    # average: the second loop begins with the features that the first read last.
    running = min(blocks, config.blocks_per_sm * device.num_sms)
    again = misses(running * config.block_t * hidden * element)
    return Traffic(
        name,
        blocks,
        config.blocks_per_sm,
        memory=(2 + again) * rows + weights + read + kept,
        loads=2 * rows + blocks * weights + 2 * read,
        stores=rows + kept,
        in_flight=min(into_flight(config, device, element), out_flight(config, device, element)),
        flops=4.0 * tokens * hidden * bottleneck,
    )


def _split(
    problem: Problem,
    plan: Split,
    device: Device,
    element: int,
    names: tuple[str, ...],
    read: int,
    kept: int,
) -> list[Traffic]:
    tokens, hidden, bottleneck = problem[:3]
    narrow, widen = plan.narrow, plan.widen
    rows, weight = tokens * hidden * element, hidden * bottleneck * element
    into, out = split_bytes(problem, plan)
    summed = plan.num_splits > 1  # else the first kernel finishes the bottleneck
    sums = tokens * bottleneck * (FLOAT * plan.num_splits if summed else element)
    one_tile = bottleneck <= widen.block_r
    slices = cdiv(hidden, plan.features_per_program)
    tiles = cdiv(hidden, widen.block_h)  # of features, each of which needs the whole bottleneck
    repeats, stored = (slices, 1) if one_tile else (tiles, cdiv(tiles, slices))
    flops = 2.0 * tokens * hidden * bottleneck
    first = Traffic(
        names[0],
        cdiv(tokens, narrow.block_t) * cdiv(bottleneck, narrow.block_r) * plan.num_splits,
        narrow.blocks_per_sm,
        memory=rows + weight + (0 if summed else read + kept),
        loads=into - sums + (0 if summed else 2 * read),
        stores=sums if summed else max(sums, kept + (0 if read else sums)),
        in_flight=into_flight(narrow, device, element),
        flops=flops,
    )
    second = Traffic(
        names[1],
        cdiv(tokens, widen.block_t) * slices,
        widen.blocks_per_sm,
        memory=(1 + misses(rows + sums)) * rows + weight + (read + kept if summed else 0),
        loads=out - rows + (read * (repeats + stored) if summed else 0),
        stores=rows + (kept * stored if summed else 0),
        in_flight=out_flight(widen, device, element),
        flops=flops,
    )
    return [first, second]


def into_flight(config: LaunchConfig, device: Device, element: int) -> int:
    """Bytes that the loop into the bottleneck has under way: all stages but the one in use."""
    tile = (config.block_t + config.block_r) * config.block_h
    return (into_stages(config, device, element, element) - 1) * tile * element


def out_flight(config: LaunchConfig, device: Device, element: int) -> int:
    """Bytes that the loop out of the bottleneck has under way."""
    stages = out_stages(config, device, element, element, element)
    return max(1, stages - 1) * (config.block_t + config.block_r) * config.block_h * element
