"""The bytes that the kernels with a norm move, as `traffic` has them for those without.

U is T * H * element bytes. With a skip, and where L2 keeps the rows of a row block, a forward moves
3 U through HBM (x, the skip, normed), and 4 U where the sum is kept for a backward or the caller;
the backward's kernel moves 4 U (d_normed, the sum, ds, dx), and 5 U with a gradient of the sum.
"""

from collections.abc import Iterable

from adapterkern.backends.traffic import Traffic, misses
from adapterkern.backends.triton import norm_plan, traffic
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
    cdiv,
    out_stages,
)

FLOAT = traffic.FLOAT  # bytes of a statistic and of a partial sum


def forward(
    problem: Problem, plan: RowBlock | Split, device: Device, element: int = 2,
    save: bool = True, prenorm: bool = False, skip: bool = True,
) -> list[Traffic]:  # fmt: skip
    """The kernels of normed, of a LayerNorm with weight and bias, where x is added; `plan` is that
    without a norm."""
    tokens, hidden, bottleneck = problem[:3]
    rows, statistics = tokens * hidden * element, 2 * tokens * FLOAT if save else 0
    fused = None
    if isinstance(plan, RowBlock):
        fused = norm_plan.row_block(plan.kernel, problem, device, (2 + skip) * element)
    if fused is None:
        *first, last = traffic.forward(problem, plan, device, element, save)
        last = last._replace(memory=last.memory + skip * rows, loads=last.loads + skip * rows)
        config, _ = norm_plan.rows(tokens, hidden, device)
        blocks = cdiv(tokens, config.block_t)
        stages = norm_plan.row_stages(config, device, element)
        return [*first, last, Traffic(
            "norm_rows_kernel", blocks, _resident(config),
            memory=(1 + misses(rows)) * rows + statistics,
            loads=2 * rows + blocks * 2 * hidden * element,
            stores=rows + statistics,
            in_flight=_in_flight(config, stages, element),
        )]  # fmt: skip
    config, programs = fused
    weights, kept = 2 * hidden * bottleneck * element, tokens * bottleneck * element if save else 0
    blocks = cdiv(tokens, config.block_t)
    weight, parameters = blocks * weights / 2, blocks * 2 * hidden * element
    stages = norm_plan.row_stages(config, device, element)
    loops = (
        (rows + weight, traffic.into_flight(config, device, element)),
        ((1 + skip) * rows + weight, _out_flight(config, device, element, 1 + skip)),
        (rows + parameters, _in_flight(config, stages, element)),
    )
    return [Traffic(
        "bottleneck_norm_fwd_kernel", programs, 1,
        memory=(2 + skip + (save or prenorm)) * rows + weights + kept + statistics,
        loads=(3 + skip) * rows + blocks * (weights + 2 * hidden * element),
        stores=2 * rows + kept + statistics,
        in_flight=_mean_flight(loops),
        flops=4.0 * tokens * hidden * bottleneck,
    )]  # fmt: skip


def input_gradient(
    problem: Problem, plan: RowBlock | Split, device: Device, element: int = 2,
    d_stream: bool = False,
) -> list[Traffic]:  # fmt: skip
    """The kernels of ds, dz, dx and the norm's parameters, where x was added."""
    tokens, hidden, bottleneck = problem[:3]
    rows, statistics = tokens * hidden * element, 2 * tokens * FLOAT
    fused = None
    if isinstance(plan, RowBlock):
        fused = norm_plan.row_block(plan.kernel, problem, device, (3 + d_stream) * element)
    config, programs = fused or norm_plan.rows(tokens, hidden, device)
    blocks = cdiv(tokens, config.block_t)
    # Each row block but its first adds to the sums that a program has so far.
    parameters = 2 * hidden * FLOAT
    stages = norm_plan.row_stages(config, device, 2 * element)
    of_sum = Traffic(
        "norm_rows_bwd_kernel", programs, _resident(config),
        memory=(3 + d_stream) * rows + statistics,
        loads=(4 + d_stream) * rows + statistics + blocks * 2 * hidden * element
        + (blocks - programs) * parameters,
        stores=rows + blocks * parameters,
        in_flight=_in_flight(config, stages, 2 * element),
    )  # fmt: skip
    total = Traffic(
        "norm_bwd_sum_kernel", cdiv(hidden, norm_plan.SUM.block_h), 8,
        memory=2 * hidden * element,
        loads=programs * parameters,
        stores=2 * hidden * element,
        in_flight=min(programs, norm_plan.SUM.block_t) * norm_plan.SUM.block_h * FLOAT,
    )  # fmt: skip
    if fused is None:
        return [of_sum, total, *traffic.input_gradient(problem, plan, device, element)]
    weights, units = 2 * hidden * bottleneck * element, tokens * bottleneck * element
    into = norm_plan.row_stages(config, device, (2 + d_stream) * element, element)
    tile = config.block_h * ((2 + d_stream) * config.block_t + config.block_r) * element
    weight = blocks * weights / 2
    loops = (
        (of_sum.loads / 2, of_sum.in_flight),
        (of_sum.loads / 2 + weight, max(1, into - 1) * tile),
        (rows + weight, _out_flight(config, device, element, 1)),
    )
    fused_kernel = of_sum._replace(
        kernel="bottleneck_norm_bwd_dx_kernel", per_sm=1,
        memory=of_sum.memory + rows + weights + 3 * units,
        loads=of_sum.loads + rows + blocks * weights + 2 * units,
        stores=of_sum.stores + rows + 2 * units,
        in_flight=_mean_flight(loops),
        flops=4.0 * tokens * hidden * bottleneck,
    )  # fmt: skip
    return [fused_kernel, total]


def _resident(config: LaunchConfig) -> int:
    """How many blocks of the kernels that have rows to themselves an SM holds: of 128 registers a
    thread."""
    return 512 // (32 * config.num_warps)


def _in_flight(config: LaunchConfig, stages: int, row_bytes: int) -> int:
    return max(1, stages - 1) * config.block_t * config.block_h * row_bytes


def _mean_flight(loops: Iterable[tuple[float, float]]) -> float:
    """The bytes under way on the average of loops that follow each other, each of which loads so
    many bytes and has so many of them under way."""
    loops = tuple(loops)
    return sum(loads for loads, _ in loops) / sum(loads / flight for loads, flight in loops)


def _out_flight(config: LaunchConfig, device: Device, element: int, added: int) -> int:
    """Of the loop out of the bottleneck, which reads `added` tensors [T, H] and a weight."""
    stages = out_stages(config, device, added * element, element, element)
    tile = (added * config.block_t + config.block_r) * config.block_h * element
    return max(1, stages - 1) * tile
