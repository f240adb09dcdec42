"""Launch configurations are a pure function of (problem, device).

No number here has been tuned on a GPU yet. The sizes of tiles are facts that the extension tells;
csrc/facts.h describes them.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from adapterkern.backends.cuda import extension

MAX_BOTTLENECK_SIZE = 256  # the widest tile whose sums fit the registers of one block
SLICE_FEATURES = 128  # a shorter slice of H would cost more to start than it gains
SLICE_TOKENS = 256  # likewise for slices of the tokens, in the weight gradients
TOKEN_STEP = 32  # tokens of one step in the weight gradients
# Steps of the weight gradients in shared memory at once. To use 4.3 TB/s at a latency of 1 us, each
# of 132 SMs must have 33 KB under way: five steps of six are 105 KB, two of three 43 KB, which is
# enough for the slower memories of the GPUs with less shared memory.
MANY_STAGES, FEW_STAGES = 6, 3

SMALL_MEMORY = 99 * 1024  # bytes of shared memory that a block has on every GPU from 8.0 on
LARGE_MEMORY = 227 * 1024  # on compute capability 9.0 and 10.x, with code for them
SYSTEM_MEMORY = 1024  # what the system takes of an SM's shared memory for each block
MEMORY_UNIT = 128  # bytes: an SM gives a block whole units of shared memory
PANEL = 64  # features; slices of H are multiples of it
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

# The most bytes that a split form may move through L2, in passes over x and y: two is the least.
SPLIT_TRAFFIC = 3.0
# Blocks share an SM if each still has as many stages: two blocks hide each other's waits, but a
# pipeline of two stages has a single one under way.
SHARED_STAGES = 3


@dataclass(frozen=True)
class Device:
    """The properties of a GPU on which a configuration may depend."""

    num_sms: int
    cluster_memory: int = 0  # bytes of shared memory of a block in a cluster; 0: no clusters
    memory: int = SMALL_MEMORY  # bytes of shared memory of a block
    cluster_sizes: tuple[int, ...] | None = None  # those that it can place; None: all

    @property
    def block_memory(self) -> int:
        """The shared memory that one block can have."""
        return max(self.memory, self.cluster_memory)


class Problem(NamedTuple):
    """The properties of a call on which its launch depends."""

    num_tokens: int
    hidden_size: int
    bottleneck_size: int
    half: bool  # products in float16 or bfloat16
    added: int = 1  # tiles of rows that are added to the output: float32 beside half counts twice


class RowBlockFacts(NamedTuple):
    """One shape of the row-block and split forms; csrc/facts.h describes the fields."""

    half: bool
    width: int
    large: bool
    tokens: int
    threads: int
    blocks_per_sm: int
    least_bytes: int
    in_bytes: int
    out_bytes: int
    added_bytes: int
    beside_bytes: int

    def bytes_for(self, stages: int, added: int) -> int:
        """The shared memory of a block whose pipelines have so many stages."""
        out = self.beside_bytes + stages * (self.out_bytes + added * self.added_bytes)
        return max(self.least_bytes, stages * self.in_bytes, out)


class ClusterFacts(NamedTuple):
    """One shape of the cluster form."""

    width: int
    tokens: int
    threads: int
    panel_bytes: int
    beside_bytes: int
    norm_panel_bytes: int
    norm_beside_bytes: int

    def bytes_for(self, features: int, norm: bool = False) -> int:
        """The shared memory of a block that has so many features, and their norm."""
        panels = features // PANEL
        of_norm = panels * self.norm_panel_bytes + self.norm_beside_bytes if norm else 0
        return panels * self.panel_bytes + self.beside_bytes + of_norm


class GradientFacts(NamedTuple):
    """One shape of the weight gradients."""

    half: bool
    units: int
    features: int
    stage_bytes: int


class Facts(NamedTuple):
    """The shapes of the compiled kernels."""

    most_stages: int
    row_blocks: tuple[RowBlockFacts, ...]
    grouped: tuple[RowBlockFacts, ...]  # the tiles of many adapters
    clusters: tuple[ClusterFacts, ...]
    gradients: tuple[GradientFacts, ...]

    def row_block(self, problem: Problem, device: Device) -> RowBlockFacts:
        """The narrowest shape that holds R, with the largest tiles that the device has room for."""
        large = device.block_memory >= LARGE_MEMORY
        fits = [
            fact
            for fact in self.row_blocks
            if fact.half == problem.half
            and problem.bottleneck_size <= fact.width
            and fact.large <= large
        ]
        return min(fits, key=lambda fact: (fact.width, not fact.large))

    def cluster(self, problem: Problem, tokens: int) -> ClusterFacts | None:
        """The narrowest shape of so many tokens that holds R, if there is one."""
        fits = [
            fact
            for fact in self.clusters
            if problem.half and problem.bottleneck_size <= fact.width and fact.tokens == tokens
        ]
        return min(fits, default=None)

    def gradient(self, problem: Problem) -> GradientFacts:
        """The narrowest shape that holds R in one tile, or the widest, of which R takes more."""
        ours = sorted(fact for fact in self.gradients if fact.half == problem.half)
        return next((fact for fact in ours if problem.bottleneck_size <= fact.units), ours[-1])


@functools.cache
def facts() -> Facts:
    """The shapes of the kernels in the extension, which has to be there."""
    module, problem = extension.load()
    if module is None:
        raise RuntimeError(problem)
    return read_facts(module.facts())


def read_facts(told: tuple) -> Facts:
    """The facts as `adapterkern._cuda.facts` tells them."""
    panel, most_stages, row_blocks, grouped, clusters, gradients = told
    assert panel == PANEL
    return Facts(
        most_stages,
        tuple(RowBlockFacts(*row) for row in row_blocks),
        tuple(RowBlockFacts(*row) for row in grouped),
        tuple(ClusterFacts(*row) for row in clusters),
        tuple(GradientFacts(*row) for row in gradients),
    )


class Slices(NamedTuple):
    """`number` slices of `length`, of which only the last may be shorter."""

    number: int
    length: int


NO_SLICES = Slices(0, 0)


class TokenPlan(NamedTuple):
    """The form of the kernels for y in the forward, and for dz and dx in the backward.

    Without slices of H it is the row-block form; with slices alone the split form, of two kernels;
    with slices and clusters the cluster form, in which each block of a cluster takes a slice.
    """

    slices: Slices
    num_clusters: int = 0
    cluster_tokens: int = 0
    output_slices: Slices = NO_SLICES  # of H, in the second kernel of the split form
    large_tiles: bool = False
    shared_bytes: int = 0  # of a block, except in the cluster form
    width: int = 0  # of the partial sums of the split form


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def token_plan(problem: Problem, device: Device) -> TokenPlan:
    """Choose clusters of 64 tokens if they fill half the GPU and beat row blocks; else row blocks
    if they make most of one wave; else clusters of 16 tokens if they all run at once; else two
    kernels over slices of H, or clusters of 64 tokens if they take less than half of their time.
    """
    tokens, hidden, bottleneck, *_ = problem
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
    tokens, hidden, bottleneck, half, added = problem
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
