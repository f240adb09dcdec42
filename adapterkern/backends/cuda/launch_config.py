"""Launch configurations are a pure function of (problem, device).

No number here has been tuned on a GPU yet. The tile sizes are those of csrc/row_block.cuh,
csrc/cluster.cuh and csrc/gradient_tiles.cuh.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

MAX_BOTTLENECK_SIZE = 256  # the widest tile whose sums fit the registers of one block
SLICE_FEATURES = 256  # a shorter slice of H would cost more in partial sums than it gains
SLICE_TOKENS = 256  # likewise for slices of the tokens, in the weight gradients
TOKEN_STEP = 32  # tokens of one step in the weight gradients
# Steps of the weight gradients in shared memory at once. To use 4.3 TB/s at a latency of 1 us, each
# of 132 SMs must have 33 KB under way: five steps of six are 105 KB, two of three 43 KB, which is
# enough for the slower memories of the GPUs with less shared memory.
MANY_STAGES, FEW_STAGES = 6, 3
SMALL_MEMORY = 99 * 1024  # bytes of shared memory that a block has on every GPU from 8.0 on

PANEL = 64  # features; slices of H are multiples of it
CLUSTER_SIZES = (2, 4, 8)
CLUSTER_BOTTLENECK_SIZE = 128  # the widest bottleneck with a cluster form
CLUSTER_FEATURES = 128  # with fewer, the blocks of a cluster would wait more than they work
# A cluster lies within one GPC, which leaves some SMs idle: 12 of 132 at 8 blocks, as reported
# for H100 (github.com/NVIDIA/cutlass/issues/1921). The launch asks the device itself.
CLUSTER_SMS = 0.9
# At most so many bytes pass distributed shared memory per byte of x and y: it is slower than the
# caches, and the cluster form gains by not reading x and the weights a second time.
CLUSTER_EXCHANGE = 0.5


@dataclass(frozen=True)
class Device:
    """The properties of a GPU on which a configuration may depend."""

    num_sms: int
    cluster_memory: int = 0  # bytes of shared memory of a block in a cluster; 0: no clusters
    memory: int = SMALL_MEMORY  # bytes of shared memory of a block


class Problem(NamedTuple):
    """The properties of a call on which its launch depends."""

    num_tokens: int
    hidden_size: int
    bottleneck_size: int
    half: bool  # products in float16 or bfloat16


class Slices(NamedTuple):
    """`number` slices of `length`, of which only the last may be shorter."""

    number: int
    length: int


class TokenPlan(NamedTuple):
    """The form of the kernels for y in the forward, and for dz and dx in the backward.

    Without slices of H it is the row-block form; with slices alone the split form, of two kernels;
    with slices and clusters the cluster form, in which each block of a cluster takes a slice.
    """

    slices: Slices
    num_clusters: int = 0
    cluster_tokens: int = 0


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block_tokens(bottleneck_size: int, half: bool) -> int:
    """The tokens of one block, as in RowBlockShape of csrc/row_block.cuh."""
    if half:
        return 128 if 32 < bottleneck_size <= 128 else 64
    return 32 if bottleneck_size > 128 else 64


def block_width(bottleneck_size: int) -> int:
    """The units of one block, as in switch_block_r of csrc/static_switch.h."""
    return next(width for width in (16, 32, 64, 128, 256) if bottleneck_size <= width)


def cluster_bytes(features: int, tokens: int, width: int) -> int:
    """The shared memory of one block, as in ClusterShape of csrc/cluster.cuh: two tiles of x and
    both weights in panels, the bottleneck, and the sums or the staging buffers of the output.
    """
    panel = (2 * tokens * (PANEL + 8) + width * (PANEL + 8) + PANEL * (width + 8)) * 2
    warps_over_units = min(8 * 16 // tokens, width // 16)
    warps_over_features = 8 * 16 // tokens // warps_over_units
    sums = max(warps_over_features * tokens * (width + 8) * 4, 8 * 16 * (32 + 4) * 4)
    return features // PANEL * panel + tokens * (width + 8) * 2 + sums


@functools.lru_cache(maxsize=4096)
def token_plan(problem: Problem, device: Device) -> TokenPlan:
    """Choose clusters of 64 tokens if they fill half the GPU; else row blocks if they make most of
    one wave; else clusters of 16 tokens if they all run at once; else two kernels, with as many
    slices of H as make two blocks an SM.
    """
    tokens, hidden, bottleneck, half = problem
    blocks = cdiv(tokens, block_tokens(bottleneck, half))
    sizes = _cluster_sizes(problem, device, 64)
    filling = [size for size in sizes if 2 * size * cdiv(tokens, 64) >= device.num_sms]
    cheap = [s for s in filling if 1.5 * bottleneck * (s - 1) <= CLUSTER_EXCHANGE * hidden]
    if cheap:
        return _clusters(problem, device, cheap[0], 64)
    if 4 * blocks >= 3 * device.num_sms:
        return TokenPlan(Slices(0, 0))
    sizes = _cluster_sizes(problem, device, 16)
    single = [size for size in sizes if size * cdiv(tokens, 16) <= CLUSTER_SMS * device.num_sms]
    if single:
        return _clusters(problem, device, single[-1], 16)
    return TokenPlan(_slices(hidden, 2 * device.num_sms // blocks, SLICE_FEATURES, PANEL))


def _cluster_sizes(problem: Problem, device: Device, tokens: int) -> list[int]:
    """The sizes of clusters whose tiles fit the shared memory."""
    _, hidden, bottleneck, half = problem
    if not half or bottleneck > CLUSTER_BOTTLENECK_SIZE:
        return []
    width = block_width(bottleneck)
    return [
        size
        for size in CLUSTER_SIZES
        if size * CLUSTER_FEATURES <= hidden
        and cluster_bytes(_length(hidden, size), tokens, width) <= device.cluster_memory
    ]


def _clusters(problem: Problem, device: Device, size: int, tokens: int) -> TokenPlan:
    number = min(cdiv(problem.num_tokens, tokens), max(1, device.num_sms // size))
    return TokenPlan(Slices(size, _length(problem.hidden_size, size)), number, tokens)


def _length(size: int, number: int, multiple: int = PANEL) -> int:
    return cdiv(cdiv(size, number), multiple) * multiple


def gradient_tile(bottleneck_size: int, half: bool) -> tuple[int, int]:
    """The units and features of a block of the weight gradients, as in csrc/weight_gradients.cu."""
    if half:
        return (64 if bottleneck_size <= 64 else 128), 256
    return (16 if bottleneck_size <= 16 else 64), 128


def gradient_bytes(bottleneck_size: int, half: bool, stages: int) -> int:
    """The shared memory of such a block, as in GradientShape of csrc/gradient_tiles.cuh."""
    units, features = gradient_tile(bottleneck_size, half)
    return stages * TOKEN_STEP * (units + 8 + features + 8) * (2 if half else 4)


@functools.lru_cache(maxsize=4096)
def token_stages(problem: Problem, device: Device) -> int:
    """The steps of the weight gradients that are in shared memory at once."""
    many = gradient_bytes(problem.bottleneck_size, problem.half, MANY_STAGES)
    return MANY_STAGES if many <= device.memory else FEW_STAGES


@functools.lru_cache(maxsize=4096)
def token_slices(problem: Problem, device: Device) -> Slices:
    """The slices of the tokens that both weight gradients are summed over: as many as give each SM
    one block, since a second one would add to the partial sums and not to the bytes under way.
    """
    units, features = gradient_tile(problem.bottleneck_size, problem.half)
    tiles = cdiv(problem.hidden_size, features) * cdiv(problem.bottleneck_size, units)
    blocks = 2 * tiles  # each computes one product
    return _slices(problem.num_tokens, device.num_sms // blocks, SLICE_TOKENS, TOKEN_STEP)


def _slices(size: int, wanted: int, shortest: int, multiple: int) -> Slices:
    number = max(1, min(wanted, size // shortest))
    length = _length(size, number, multiple)
    return Slices(cdiv(size, length), length)
