"""Launch configurations are a pure function of (problem, device).

No number here has been tuned on a GPU yet. The sizes of tiles are facts that the extension tells;
csrc/facts.h describes them.
"""

import functools
from typing import NamedTuple

from adapterkern.backends.cuda import extension
from adapterkern.backends.cuda.facts import (
    PANEL,
    Device,
    Facts,
    Problem,
    RowBlockFacts,
    read_facts,
)

MAX_BOTTLENECK_SIZE = 256  # the widest tile whose sums fit the registers of one block
SLICE_FEATURES = 128  # a shorter slice of H would cost more to start than it gains
SLICE_TOKENS = 256  # likewise for slices of the tokens, in the weight gradients
TOKEN_STEP = 32  # tokens of one step in the weight gradients
# Steps of the weight gradients in shared memory at once. To use 4.3 TB/s at a latency of 1 us, each
# of 132 SMs must have 33 KB under way: five steps of six are 105 KB, two of three 43 KB, which is
# enough for the slower memories of the GPUs with less shared memory.
MANY_STAGES, FEW_STAGES = 6, 3

SYSTEM_MEMORY = 1024  # what the system takes of an SM's shared memory for each block
MEMORY_UNIT = 128  # bytes: an SM gives a block whole units of shared memory
CLUSTER_SIZES = (2, 4, 8)
CLUSTER_TOKENS = (64, 16)  # that a cluster works on at a time
CLUSTER_FEATURES = 128  # with fewer, the blocks of a cluster would wait more than they work
# A cluster lies within one GPC, which leaves some SMs idle: 12 of 132 at 8 blocks, as reported
# for H100 (github.com/NVIDIA/cutlass/issues/1921). The launch asks the device itself.
CLUSTER_SMS = 0.9
# At most so many bytes pass distributed shared memory per byte of x and y: it is slower than the
# caches, and the cluster form gains by not reading x and the weights a second time.
CLUSTER_EXCHANGE = 0.5
# A block of a cluster takes so much longer for a token's feature than a row block, by the cycles of
# shared memory that each spends on it and by the two waits for the other blocks (traffic.py). So
# clusters run where row blocks would leave SMs idle, with few tokens or just beyond a full wave.
CLUSTER_COST = 4 / 3

# Tiles of the next rows that a block of the resident form has room for at least: while as much is
# written as read, 16 KB under way on each SM keep up with the memory.
ROWS_AHEAD = 3
# It takes so much longer where a block has no room for all of the next rows: then the exchange of
# their sums cannot take place while the output is written.
RESIDENT_WAITS = 1.25

# The most bytes that a split form may move through L2, in passes over x and y: two is the least.
SPLIT_TRAFFIC = 3.0
# Blocks share an SM if each still has as many stages: two blocks hide each other's waits, but a
# pipeline of two stages has a single one under way.
SHARED_STAGES = 3


@functools.cache
def facts() -> Facts:
    """The shapes of the kernels in the extension, which has to be there."""
    module, problem = extension.load()
    if module is None:
        raise RuntimeError(problem)
    return read_facts(module.facts())


class Slices(NamedTuple):
    """`number` slices of `length`, of which only the last may be shorter."""

    number: int
    length: int


NO_SLICES = Slices(0, 0)


class TokenPlan(NamedTuple):
    """The form of the kernels for y in the forward, and for dz and dx in the backward.

    Without slices of H it is the row-block form; with slices alone the split form, of two kernels;
    with slices and clusters the cluster form, in which each block of a cluster takes a slice, and
    so it does in the resident form, with resident clusters.
    """

    slices: Slices
    num_clusters: int = 0
    cluster_tokens: int = 0
    output_slices: Slices = NO_SLICES  # of H, in the second kernel of the split form
    large_tiles: bool = False
    shared_bytes: int = 0  # of a block, except in the cluster form
    width: int = 0  # of the partial sums of the split form
    resident_clusters: int = 0


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def token_plan(problem: Problem, device: Device) -> TokenPlan:
    """Choose the resident form where it runs; else clusters of 64 tokens if they fill half the GPU
    and beat row blocks; else row blocks if they make most of one wave; else clusters of 16 tokens
    if they all run at once; else two kernels over slices of H, or clusters of 64 tokens if they
    take less than half of their time.
    """
    tokens, hidden, bottleneck, *_ = problem
    if resident := resident_plan(problem, device):
        return resident
    row_block = facts().row_block(problem, device)
    blocks = cdiv(tokens, row_block.tokens)
    wide = [clusters(problem, device, s, 64) for s in cluster_sizes(problem, device, 64)]
    filling = [c for c in wide if 2 * c.slices.number * cdiv(tokens, 64) >= device.num_sms]
    exchanged = CLUSTER_EXCHANGE * hidden
    cheap = [c for c in filling if 1.5 * bottleneck * (c.slices.number - 1) <= exchanged]
    busiest_row_block = cdiv(blocks, device.num_sms) * row_block.tokens * hidden
    if cheap and _busiest(problem, cheap[0]) < busiest_row_block:
        return cheap[0]
    if 4 * blocks >= 3 * device.num_sms:
        return row_block_plan(problem, device)
    sizes = cluster_sizes(problem, device, 16)
    single = [size for size in sizes if size * cdiv(tokens, 16) <= CLUSTER_SMS * device.num_sms]
    if single:
        return clusters(problem, device, single[-1], 16)
    # SPLIT_TRAFFIC may leave most SMs idle: then clusters win even if each of them takes as long
    # again to exchange more than CLUSTER_EXCHANGE.
    split = _split(problem, device)
    fastest = min(wide, key=lambda c: _busiest(problem, c), default=None)
    if fastest and 2 * _busiest(problem, fastest) < row_block.tokens * split.slices.length:
        return fastest
    return split


def resident_plan(problem: Problem, device: Device) -> TokenPlan | None:
    """The resident form, if the device has it, the call's tensors are for it, a slice of the rows
    fits a block, and there are tiles for half of the SMs.
    """
    fact, hidden = facts().resident, problem.hidden_size
    if not device.warpgroups or problem.beside is None or problem.bottleneck_size > fact.width:
        return None
    placed = CLUSTER_SIZES if device.cluster_sizes is None else device.cluster_sizes
    tiles, plans = cdiv(problem.num_tokens, fact.tokens), []
    for size in (size for size in placed if size * PANEL <= hidden):
        length = slice_length(hidden, size)
        slots = fact.row_slots(device.block_memory, length // PANEL, problem.beside)
        number = min(tiles, device.num_sms // size)
        if slots < length // PANEL + ROWS_AHEAD or 2 * number * size < device.num_sms:
            continue
        waits = 1 if slots * PANEL >= 2 * length else RESIDENT_WAITS
        cost = cdiv(tiles, number) * length * waits
        plan = TokenPlan(
            Slices(size, length), shared_bytes=device.block_memory, resident_clusters=number
        )
        plans.append((cost, size, plan))
    return min(plans)[-1] if plans else None


def _busiest(problem: Problem, plan: TokenPlan) -> float:
    """The work of the busiest block, tokens times features, in that of a row block."""
    turns = cdiv(cdiv(problem.num_tokens, plan.cluster_tokens), plan.num_clusters)
    return CLUSTER_COST * turns * plan.cluster_tokens * plan.slices.length


@functools.lru_cache(maxsize=4096)
def row_block_plan(problem: Problem, device: Device) -> TokenPlan:
    """The row-block form, at any number of tokens."""
    fact = facts().row_block(problem, device)
    memory = block_memory(fact, problem.added, device, cdiv(problem.num_tokens, fact.tokens))
    return TokenPlan(NO_SLICES, large_tiles=fact.large, shared_bytes=memory)


def block_memory(fact: RowBlockFacts, added: int, device: Device, blocks: int) -> int:
    """The shared memory of a block: all that its pipelines can use, or the share that lets as many
    blocks as there are for an SM run on it at once.
    """
    sm_memory = device.block_memory + SYSTEM_MEMORY
    useful = fact.bytes_for(facts().most_stages, added)
    for number in range(min(fact.blocks_per_sm, cdiv(blocks, device.num_sms)), 1, -1):
        share = sm_memory // number // MEMORY_UNIT * MEMORY_UNIT - SYSTEM_MEMORY
        if fact.bytes_for(SHARED_STAGES, added) <= share:
            return min(share, useful)
    return min(device.block_memory, useful)


def _split(problem: Problem, device: Device) -> TokenPlan:
    """Two kernels over as many slices of H as fill the GPU once, unless their partial sums would
    cost more than SPLIT_TRAFFIC allows.

    Of one block an SM each has all of its memory, for five stages under way.
    """
    tokens, hidden, *_ = problem
    fact = facts().row_block(problem, device)
    blocks = cdiv(tokens, fact.tokens)
    wanted = max(1, device.num_sms // blocks)
    while wanted > 1 and split_passes(problem, fact, wanted, wanted) > _most_passes(problem, fact):
        wanted -= 1
    slices = _slices(hidden, wanted, SLICE_FEATURES, PANEL)
    memory = block_memory(fact, problem.added, device, blocks * slices.number)
    return TokenPlan(
        slices,
        output_slices=slices,
        large_tiles=fact.large,
        shared_bytes=memory,
        width=fact.width,
    )


def split_passes(problem: Problem, fact: RowBlockFacts, slices: int, outputs: int) -> float:
    """The bytes that a split form moves through L2, in passes over x and y.

    x and what is added are read by one kernel each, and y is written. A block of tokens reads both
    weights; every slice writes its partial sums, and every slice of the output reads them all.
    """
    tokens, hidden, bottleneck, half, added, _ = problem
    element = 2 if half else 4
    rows = tokens * hidden * element
    weights = 2 * bottleneck * hidden * element * cdiv(tokens, fact.tokens)
    partials = slices * (1 + outputs) * tokens * fact.width * 4
    return ((2 + added) * rows + weights + partials) / (2 * rows)


def _most_passes(problem: Problem, fact: RowBlockFacts) -> float:
    """SPLIT_TRAFFIC, or half as much again as the rows and the weights alone where these come near
    it: of few tokens or wide bottlenecks.
    """
    return max(SPLIT_TRAFFIC, 1.5 * split_passes(problem, fact, 0, 0))


def cluster_sizes(problem: Problem, device: Device, tokens: int, norm: bool = False) -> list[int]:
    """The sizes of clusters whose tiles fit the shared memory, and that the device can place. For a
    norm, which has no other form, clusters may be small.
    """
    fact = facts().cluster(problem, tokens)
    if fact is None:
        return []
    placed = CLUSTER_SIZES if device.cluster_sizes is None else device.cluster_sizes
    return [
        size
        for size in placed
        if (size * CLUSTER_FEATURES <= problem.hidden_size or (norm and size == min(placed)))
        and fact.bytes_for(slice_length(problem.hidden_size, size), norm) <= device.cluster_memory
    ]


def clusters(problem: Problem, device: Device, size: int, tokens: int) -> TokenPlan:
    """Clusters of so many blocks, as many as fill the GPU or as there is work for."""
    number = min(cdiv(problem.num_tokens, tokens), max(1, device.num_sms // size))
    return TokenPlan(Slices(size, slice_length(problem.hidden_size, size)), number, tokens)


def slice_length(size: int, number: int, multiple: int = PANEL) -> int:
    """The length of `number` slices of `size`, in whole multiples."""
    return cdiv(cdiv(size, number), multiple) * multiple


@functools.lru_cache(maxsize=4096)
def token_stages(problem: Problem, device: Device) -> int:
    """The steps of the weight gradients that are in shared memory at once."""
    many = MANY_STAGES * facts().gradient(problem).stage_bytes
    return MANY_STAGES if many <= device.block_memory else FEW_STAGES


@functools.lru_cache(maxsize=4096)
def token_slices(problem: Problem, device: Device) -> Slices:
    """The slices of the tokens that both weight gradients are summed over: as many as give each SM
    one block, since a second one would add to the partial sums and not to the bytes under way.
    """
    fact = facts().gradient(problem)
    tiles = cdiv(problem.hidden_size, fact.features) * cdiv(problem.bottleneck_size, fact.units)
    blocks = 2 * tiles  # each computes one product
    return _slices(problem.num_tokens, device.num_sms // blocks, SLICE_TOKENS, TOKEN_STEP)


def _slices(size: int, wanted: int, shortest: int, multiple: int) -> Slices:
    number = max(1, min(wanted, size // shortest))
    length = slice_length(size, number, multiple)
    return Slices(cdiv(size, length), length)
