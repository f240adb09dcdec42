"""The bytes that each plan moves: one formula a kernel, in the kernels' own terms.

Sizes are those of uniform half-precision calls with the input as residual; biases and column sums
are too small to count. Beside the bytes through HBM and L2 this counts the cycles of shared memory,
which bound these kernels before HBM does: mma.sync reads its operands there, fragment by fragment.
"""

from adapterkern.backends.cuda import launch_config, norm
from adapterkern.backends.cuda.facts import PANEL, ClusterFacts, Device, Problem, RowBlockFacts
from adapterkern.backends.cuda.launch_config import (
    SYSTEM_MEMORY,
    TOKEN_STEP,
    Slices,
    TokenPlan,
    cdiv,
    token_stages,
)
from adapterkern.backends.traffic import Traffic, misses

ELEMENT, FLOAT = 2, 4  # bytes of a tensor's element and of a partial sum
PADDING = 16 // ELEMENT  # elements at the end of each row of a tile
WARP_TOKENS = 16  # rows of a warp's product
CYCLE_BYTES = 128  # of shared memory
# A product leaves a warp's registers through shared memory: written with two-way bank conflicts,
# read without.
ROOM_PASSES = 3
# One wait of a cluster for all of its blocks, which also writes back and drops what L1 holds.
BARRIER_SECONDS = 450e-9
# The same by st.async, there and back, with the activation between: two latencies of distributed
# shared memory under load, and the instructions.
EXCHANGE_SECONDS = 1.5e-6
# bottleneck_bwd_dw_sum_kernel: sides of a tile, blocks an SM, slices whose loads are under way.
SUM_SIDE, SUM_BLOCKS, SUM_AHEAD = 32, 2, 16


def forward(problem: Problem, plan: TokenPlan, device: Device, save: bool = True) -> list[Traffic]:
    """The kernels of y; with `save` z is stored for the backward."""
    kept = problem.num_tokens * problem.bottleneck_size * ELEMENT if save else 0
    return _tokens(problem, plan, device, read=0, kept=kept)


def norm_forward(
    problem: Problem, plan: TokenPlan, device: Device, save: bool = True
) -> list[Traffic]:
    """The kernel of y and its norm. y itself is written where it is saved; what is added beside x
    is read.
    """
    (plain,) = forward(problem, plan, device, save)
    rows = problem.num_tokens * problem.hidden_size * ELEMENT
    more = problem.added - 1
    tile = 2 * plan.cluster_tokens * plan.slices.length  # elements: the sum, stored and read again
    turns = cdiv(cdiv(problem.num_tokens, plan.cluster_tokens), plan.num_clusters)
    of_norm = plain._replace(
        memory=plain.memory + (more + save) * rows,
        loads=plain.loads + more * rows,
        stores=plain.stores + save * rows,
        shared_cycles=plain.shared_cycles + plain.blocks * turns * tile * ELEMENT / CYCLE_BYTES,
        waits=1.5 * plain.waits,  # three for two
    )
    return [of_norm]


def norm_gradients(
    problem: Problem, device: Device, stream: bool = False, parameters: bool = True
) -> list[Traffic]:
    """The gradient of y from those of its norm and, with `stream`, of y; the sums for those of the
    norm's parameters.
    """
    tokens, hidden, *_ = problem
    rows, blocks = tokens * hidden * ELEMENT, norm.row_blocks(tokens, hidden, device)
    sums = 2 * blocks * hidden * FLOAT if parameters else 0
    of_rows = Traffic(
        "bottleneck_bwd_norm_kernel",
        blocks,
        norm.ROW_BLOCKS_PER_SM,
        memory=(3 + stream) * rows,
        loads=(2 + stream) * rows,
        stores=rows + sums,
        in_flight=2 * norm.ROW_THREADS * norm.VECTOR * ELEMENT,
    )
    if not parameters:
        return [of_rows]
    total = Traffic(
        "bottleneck_bwd_norm_sum_kernel",
        2 * cdiv(hidden, SUM_SIDE),
        SUM_BLOCKS,
        memory=0,
        loads=sums,
        stores=2 * hidden * ELEMENT,
        in_flight=SUM_SIDE * SUM_AHEAD * FLOAT,
    )
    return [of_rows, total]


def input_gradient(problem: Problem, plan: TokenPlan, device: Device) -> list[Traffic]:
    """The kernels of dz and dx, which read z and store dz and a for the weight gradients."""
    units = problem.num_tokens * problem.bottleneck_size * ELEMENT
    return _tokens(problem, plan, device, read=units, kept=2 * units)


def weight_gradients(problem: Problem, plan: Slices, device: Device) -> list[Traffic]:
    """The products over the tokens, and the sum of their partial sums."""
    tokens, hidden, bottleneck, *_ = problem
    fact = launch_config.facts().gradient(problem)
    unit_blocks, feature_blocks = cdiv(bottleneck, fact.units), cdiv(hidden, fact.features)
    rows, units = tokens * hidden * ELEMENT, tokens * bottleneck * ELEMENT
    partials = 2 * plan.number * hidden * bottleneck * FLOAT
    gradients = 2 * hidden * bottleneck * ELEMENT
    blocks = 2 * unit_blocks * feature_blocks * plan.number
    # A warp multiplies 64 units by its part of the features, and reads the fragments of both.
    groups = max(1, fact.units // 64)
    across = 8 // groups
    step = TOKEN_STEP * ELEMENT * (fact.units * across + fact.features * groups) + fact.stage_bytes
    products = Traffic(
        "bottleneck_bwd_dw_kernel",
        blocks,
        1,
        memory=2 * (rows + units),
        loads=2 * (rows * unit_blocks + units * feature_blocks),
        stores=partials,
        in_flight=(token_stages(problem, device) - 1) * fact.stage_bytes,
        shared_cycles=blocks * cdiv(plan.length, TOKEN_STEP) * step / CYCLE_BYTES,
        flops=4.0 * tokens * hidden * bottleneck,
    )
    total = Traffic(
        "bottleneck_bwd_dw_sum_kernel",
        2 * cdiv(hidden, SUM_SIDE) * cdiv(bottleneck, SUM_SIDE),
        SUM_BLOCKS,
        memory=gradients,
        loads=partials,
        stores=gradients,
        in_flight=min(plan.number, SUM_AHEAD) * SUM_SIDE**2 * FLOAT,
    )
    return [products, total]


def _tokens(
    problem: Problem, plan: TokenPlan, device: Device, read: int, kept: int
) -> list[Traffic]:
    """y, or dz and dx; `read` and `kept` are the bytes of bottleneck tensors beside the rows."""
    if plan.num_clusters > 0:
        return [_cluster(problem, plan, read, kept)]
    if plan.resident_clusters > 0:
        return [_resident(problem, plan, read, kept)]
    fact = launch_config.facts().row_block(problem, device)
    if plan.slices.number == 0:
        return [_row_block(problem, plan, fact, device, read, kept)]
    return _split(problem, plan, fact, device, read, kept)


def _row_block(
    problem: Problem, plan: TokenPlan, fact: RowBlockFacts, device: Device, read: int, kept: int
) -> Traffic:
    tokens, hidden, bottleneck, *_ = problem
    blocks, per_sm = cdiv(tokens, fact.tokens), blocks_per_sm(plan.shared_bytes, fact, device)
    rows, weights = tokens * hidden * ELEMENT, 2 * hidden * bottleneck * ELEMENT
    running = min(blocks, per_sm * device.num_sms) * fact.tokens * hidden * ELEMENT
    into, out = shared_bytes(fact, hidden)
    return Traffic(
        "bottleneck_row_block_kernel",
        blocks,
        per_sm,
        memory=(2 + misses(running)) * rows + weights + read + kept,
        loads=2 * rows + blocks * weights + read,
        stores=rows + kept,
        in_flight=min(in_flight(problem.added, plan.shared_bytes, fact)),
        shared_cycles=blocks * (into + out) / CYCLE_BYTES,
        flops=4.0 * tokens * hidden * bottleneck,
    )


def _split(
    problem: Problem, plan: TokenPlan, fact: RowBlockFacts, device: Device, read: int, kept: int
) -> list[Traffic]:
    tokens, hidden, bottleneck, *_ = problem
    token_blocks, per_sm = cdiv(tokens, fact.tokens), blocks_per_sm(plan.shared_bytes, fact, device)
    rows, weight = tokens * hidden * ELEMENT, hidden * bottleneck * ELEMENT
    sums = plan.slices.number * tokens * plan.width * FLOAT
    outputs = plan.output_slices.number
    into, out = shared_bytes(fact, hidden)
    flight_in, flight_out = in_flight(problem.added, plan.shared_bytes, fact)
    flops = 2.0 * tokens * hidden * bottleneck
    first = Traffic(
        "bottleneck_split_first_kernel",
        token_blocks * plan.slices.number,
        per_sm,
        memory=rows + weight,
        loads=rows + token_blocks * weight,
        stores=sums,
        in_flight=flight_in,
        shared_cycles=token_blocks * into / CYCLE_BYTES,
        flops=flops,
    )
    second = Traffic(
        "bottleneck_split_second_kernel",
        token_blocks * outputs,
        per_sm,
        memory=(1 + misses(rows + sums)) * rows + weight + read + kept,
        loads=rows + token_blocks * weight + outputs * (sums + read),
        stores=rows + kept,
        in_flight=flight_out,
        shared_cycles=token_blocks * out / CYCLE_BYTES,
        flops=flops,
    )
    return [first, second]


def _cluster(problem: Problem, plan: TokenPlan, read: int, kept: int) -> Traffic:
    tokens, hidden, bottleneck, *_ = problem
    fact = launch_config.facts().cluster(problem, plan.cluster_tokens)
    assert fact is not None
    rows, weights = tokens * hidden * ELEMENT, 2 * hidden * bottleneck * ELEMENT
    tiles = cdiv(cdiv(tokens, fact.tokens), plan.num_clusters)  # of the busiest cluster, in turn
    blocks, features = plan.num_clusters * plan.slices.number, plan.slices.length
    first = (fact.tokens + 2 * bottleneck) * features * ELEMENT  # with the weights, all at once
    return Traffic(
        "bottleneck_cluster_kernel",
        blocks,
        1,
        memory=2 * rows + weights + read + kept,
        loads=rows + plan.num_clusters * weights + read,
        stores=rows + kept,
        in_flight=first if tiles == 1 else fact.tokens * features * ELEMENT,
        shared_cycles=blocks * tiles * _cluster_bytes(fact, features) / CYCLE_BYTES,
        flops=4.0 * tokens * hidden * bottleneck,
        waits=2 * tiles * BARRIER_SECONDS,
    )


def _resident(problem: Problem, plan: TokenPlan, read: int, kept: int) -> Traffic:
    tokens, hidden, bottleneck, *_ = problem
    fact, beside = launch_config.facts().resident, problem.beside or 0
    rows, weights = tokens * hidden * ELEMENT, 2 * hidden * bottleneck * ELEMENT
    tiles, panels = cdiv(tokens, fact.tokens), plan.slices.length // PANEL
    turns = cdiv(tiles, plan.resident_clusters)  # of the busiest cluster
    blocks = plan.resident_clusters * plan.slices.number
    # Of a panel: tiles that are copied; two operands of each product; the rows read, the output
    # written and read again; and the bias. Of a tile: the sums, and a read with two-way conflicts.
    of_panel = (3 + 2 * beside + 4 + 3) * fact.tile_bytes + 4 * PANEL * WARP_TOKENS
    of_tile = 3 * fact.tokens * fact.width * FLOAT + fact.tile_bytes
    slots = fact.row_slots(plan.shared_bytes, panels, beside)  # a tile at work takes panels of them
    return Traffic(
        "bottleneck_resident_kernel",
        blocks,
        1,
        memory=(2 + beside) * rows + weights + read + kept,
        loads=(1 + beside) * rows + tiles * weights + read,
        stores=rows + kept,
        in_flight=(slots - panels) * fact.tile_bytes,
        shared_cycles=blocks * turns * (panels * of_panel + of_tile) / CYCLE_BYTES,
        flops=4.0 * tokens * hidden * fact.width,
        waits=EXCHANGE_SECONDS * (1 if slots >= 2 * panels else turns),
    )


def blocks_per_sm(shared: int, fact: RowBlockFacts, device: Device) -> int:
    """How many blocks of so much shared memory an SM holds."""
    memory = device.block_memory + SYSTEM_MEMORY
    return max(1, min(fact.blocks_per_sm, memory // (shared + SYSTEM_MEMORY)))


def in_flight(added: int, shared: int, fact: RowBlockFacts) -> tuple[int, int]:
    """Bytes under way in the pipelines into and out of the bottleneck: all stages but one."""
    stage = fact.out_bytes + added * fact.added_bytes
    stages_in = min(launch_config.facts().most_stages, shared // fact.in_bytes)
    stages_out = min(launch_config.facts().most_stages, (shared - fact.beside_bytes) // stage)
    return max(1, stages_in - 1) * fact.in_bytes, max(1, stages_out - 1) * stage


def shared_bytes(fact: RowBlockFacts, features: int) -> tuple[int, int]:
    """Bytes that one block writes to and reads from shared memory, into and out of the bottleneck:
    a warp reads its rows once and the whole weight.
    """
    warps_tokens = fact.tokens // WARP_TOKENS
    parts = fact.threads // 32 // warps_tokens  # warps that share rows, and divide the width
    step_features = fact.added_bytes // (fact.tokens * ELEMENT) - PADDING
    weight = features * fact.width * (1 + warps_tokens) * ELEMENT
    bottleneck = fact.tokens * fact.width
    into = weight + fact.tokens * features * (1 + parts) * ELEMENT + 2 * bottleneck * FLOAT
    fragments = bottleneck * ELEMENT * parts * cdiv(features, step_features)
    room = ROOM_PASSES * fact.tokens * features * FLOAT
    added = 2 * fact.tokens * features * ELEMENT
    return into, bottleneck * ELEMENT + weight + fragments + room + added


def _cluster_bytes(fact: ClusterFacts, features: int) -> int:
    """Those of one block of a cluster for one tile of its tokens."""
    warps = fact.threads // 32
    over_tokens = fact.tokens // WARP_TOKENS
    over_units = min(warps // over_tokens, fact.width // 16)
    over_features = warps // over_tokens // over_units
    bottleneck = fact.tokens * fact.width
    weights = 2 * features * fact.width * over_tokens * ELEMENT
    rows = fact.tokens * features * (2 + over_units) * ELEMENT  # the last time to add them
    # Parts of the features are written, read and added up before the other blocks read the sums.
    sums = bottleneck * FLOAT * (2 if over_features == 1 else 2 * over_features + 2)
    fragments = bottleneck * ELEMENT * (1 + cdiv(features, PANEL // 2))
    return weights + rows + sums + fragments + ROOM_PASSES * fact.tokens * features * FLOAT
