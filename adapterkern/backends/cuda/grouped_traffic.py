"""The bytes that the kernels of many adapters move, as `traffic` has them for those of one.

Of the weights, every adapter that some token takes comes from memory once; each of its tiles, or by
rows each of its tokens, loads them anew, from L2. Empty tiles count as nothing.
"""

from adapterkern.backends.cuda.facts import Device, Problem
from adapterkern.backends.cuda.grouped import ROW_BLOCKS_PER_SM, GroupedPlan, tile_facts
from adapterkern.backends.cuda.launch_config import cdiv
from adapterkern.backends.cuda.traffic import (
    CYCLE_BYTES,
    ELEMENT,
    FLOAT,
    blocks_per_sm,
    in_flight,
    shared_bytes,
)
from adapterkern.backends.traffic import ENTRY, INDEX, Batch, Traffic, misses

ROW_FLIGHT = 256 * 64  # bytes of a weight that the threads of a block by rows have under way


def forward(
    problem: Problem, plan: GroupedPlan, device: Device, batch: Batch, save: bool = True
) -> list[Traffic]:
    """The kernels of y; with `save` z is stored for the backward."""
    kept = problem.num_tokens * problem.bottleneck_size * ELEMENT if save else 0
    if plan.num_tiles > 0:
        return [_tiles(problem, plan, device, batch, kept)]
    return _rows(problem, plan, batch, kept)


def _tiles(problem: Problem, plan: GroupedPlan, device: Device, batch: Batch, kept: int) -> Traffic:
    tokens, hidden, bottleneck, *_ = problem
    fact = tile_facts(problem)
    blocks, free = batch.row_blocks(fact.tokens), cdiv(batch.rest, fact.tokens)
    per_sm = blocks_per_sm(plan.shared_bytes, fact, device)
    rows, taken = tokens * hidden * ELEMENT, batch.taken * hidden * ELEMENT
    weights = 2 * hidden * bottleneck * ELEMENT
    routing = INDEX * tokens + ENTRY * (blocks + free)
    running = min(blocks, per_sm * device.num_sms) * taken / max(1, blocks)
    into, out = shared_bytes(fact, hidden)
    return Traffic(
        "bottleneck_grouped_tiles_kernel",
        blocks + free,
        per_sm,
        memory=2 * rows + misses(running) * taken + batch.used * weights + routing + kept,
        loads=rows + taken + blocks * weights + routing,
        stores=rows + kept,
        in_flight=min(in_flight(problem.added, plan.shared_bytes, fact)),
        shared_cycles=(blocks * (into + out) + free * out) / CYCLE_BYTES,
        flops=4.0 * fact.tokens * blocks * hidden * bottleneck,
    )


def _rows(problem: Problem, plan: GroupedPlan, batch: Batch, kept: int) -> list[Traffic]:
    tokens, hidden, bottleneck, *_ = problem
    number = plan.slices.number
    rows, taken = tokens * hidden * ELEMENT, batch.taken * hidden * ELEMENT
    weight, slots = hidden * bottleneck * ELEMENT, INDEX * tokens
    sums = number * batch.taken * bottleneck * FLOAT
    first = Traffic(
        "bottleneck_grouped_rows_first_kernel",
        max(1, batch.taken) * number,
        ROW_BLOCKS_PER_SM,
        memory=taken + batch.used * weight + slots,
        loads=taken + batch.taken * weight + slots,
        stores=sums,
        in_flight=ROW_FLIGHT,
    )
    second = Traffic(
        "bottleneck_grouped_rows_second_kernel",
        tokens * number,
        ROW_BLOCKS_PER_SM,
        memory=(1 + misses(rows + sums)) * rows + batch.used * weight + kept,
        loads=rows + batch.taken * weight + number * sums + slots,
        stores=rows + kept,
        in_flight=ROW_FLIGHT,
    )
    return [first, second]
