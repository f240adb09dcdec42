"""Launch configurations are a pure function of (problem, device): no run stops to autotune.

Every tile compiles within the registers and the shared memory of each architecture from sm_80 to
sm_120, as tests/test_triton_compile.py checks. The number of row blocks that fill the GPU decides
which form runs, and how it is cut into slices. The tiles of half precision were chosen by sweeps on
an H200 (docs/performance.md); the others have not been measured.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

# Both weights of row blocks under 64 tokens, in bytes: with more, reading them takes each block
# longer than the second kernel of the split form.
MOST_WEIGHTS_OF_SHORT_BLOCKS = 512 * 1024


@dataclass(frozen=True)
class Device:
    """The properties of a GPU on which a configuration may depend."""

    num_sms: int
    shared_memory: int  # bytes one block may use (opt-in limit)
    major: int = 9  # of the compute capability
    # In bytes; those of an H100 if nothing else is known. No tile depends on it, so tiles that were
    # searched on a GPU serve one that differs in it alone.
    l2: int = field(default=50 * 1024 * 1024, compare=False)

    @property
    def small(self) -> bool:
        """The 99 KB class: compute capability 8.6, 8.9 and 12.x."""
        return self.shared_memory < 160 * 1024

    @property
    def large(self) -> bool:
        """The 227 KB class: compute capability 9.0 and 10.x."""
        return self.shared_memory > 200 * 1024

    @property
    def hopper(self) -> bool:
        """Where `wgmma` leaves enough registers for a row block of 256 units."""
        return self.large and self.major == 9


class Problem(NamedTuple):
    """The properties of a call on which its launch depends."""

    num_tokens: int
    hidden_size: int
    bottleneck_size: int
    ieee: bool  # float32 products in full precision: CUDA cores, so smaller tiles
    wide: bool  # 4-byte tiles (float32 through TF32, or float32 tensors converted on load)

    @property
    def ragged(self) -> bool:
        """Whether rows of H are no whole vectors: then a tile takes many more registers."""
        return self.hidden_size % 16 != 0

    @property
    def plain(self) -> bool:
        """Whether tiles are of half precision and whole vectors."""
        return not (self.ieee or self.wide or self.ragged)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of one kernel.

    blocks_per_sm: how many of its blocks the plan counts on an SM to hold at once, which registers
    and shared memory must allow; num_stages, most_out_stages: of the loops into and out of the
    bottleneck, where shared memory has room for them.
    """

    block_t: int
    block_h: int
    block_r: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int = 1
    most_out_stages: int = 3


@dataclass(frozen=True)
class RowBlock:
    """One program owns a row block and all of R."""

    kernel: LaunchConfig


@dataclass(frozen=True)
class Split:
    """Two kernels: into the bottleneck (summed over `num_splits` slices of H), and out of it, where
    each program has `features_per_program` of the features."""

    narrow: LaunchConfig
    widen: LaunchConfig
    num_splits: int
    features_per_split: int
    features_per_program: int


@dataclass(frozen=True)
class WeightGradient:
    """Partial sums over `num_splits` slices of the tokens."""

    kernel: LaunchConfig
    num_splits: int
    tokens_per_split: int


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _slices(size: int, wanted: int, block: int) -> tuple[int, int]:
    """Return the number and the length of at most `wanted` slices of whole blocks that cover
    `size`."""
    length = cdiv(cdiv(size, wanted), block) * block
    return cdiv(size, length), length


def _power_of_two(size: int, choices: tuple[int, ...]) -> int:
    """The smallest of `choices` that holds `size`, or the largest if none does.

    16 is the narrowest tensor-core tile. Few choices keep the number of distinct kernels small.
    """
    return next((choice for choice in choices if size <= choice), choices[-1])


def into_stages(config: LaunchConfig, device: Device, row_bytes: int, weight_bytes: int) -> int:
    """Stages of the loop into the bottleneck: as many as the plan allows and shared memory holds.

    Args:
        row_bytes, weight_bytes: of an element of the tensor [T, H] and of the weight that it reads.
    """
    tile = config.block_h * (config.block_t * row_bytes + config.block_r * weight_bytes)
    return _fitting(config, device, tile)


def gradient_stages(config: LaunchConfig, device: Device, row_bytes: int, unit_bytes: int) -> int:
    """Stages of the loop of the weight gradients, as above.

    Args:
        row_bytes: of an element each of x and dy, together; unit_bytes: of dz and a.
    """
    tile = config.block_t * (config.block_h * row_bytes + config.block_r * unit_bytes)
    return _fitting(config, device, tile)


def _fitting(config: LaunchConfig, device: Device, tile: int) -> int:
    room = device.shared_memory // config.blocks_per_sm - 8 * 1024  # for changes of layout
    return max(2, min(config.num_stages, room // tile))


def out_stages(
    config: LaunchConfig, device: Device, row_bytes: int, weight_bytes: int, output_bytes: int
) -> int:
    """Stages of the loop that leaves the bottleneck: as many as the plan allows and shared memory
    holds.

    Args:
        row_bytes: of one element each of the tensors [T, H] that the loop reads, all together.
        weight_bytes, output_bytes: of an element of its weight, and of its output.
    """
    rows, weight = config.block_t * config.block_h, config.block_r * config.block_h
    room = device.shared_memory // config.blocks_per_sm
    for stages in range(config.most_out_stages, 1, -1):
        tiles = stages + weight_bytes // 4  # TF32 and conversion take one more
        loads = (stages - 1) * rows * row_bytes + tiles * weight * weight_bytes
        # The output changes its layout there too: what the compiler took for that at most, on sm_80
        # and sm_90 and in every mix of types.
        if loads + rows * (2 + output_bytes) + 1024 <= room:
            return stages
    return 1


def sum_stages(config: LaunchConfig, device: Device) -> int:
    """Stages of the loop that adds up partial sums: 4, or as many as shared memory holds."""
    return min(4, 1 + device.shared_memory // (4 * config.block_t * config.block_r))


@functools.lru_cache(maxsize=4096)
def token_plan(problem: Problem, device: Device) -> RowBlock | Split:
    """Plan y of the forward, and dz and dx of the backward, whose products mirror the forward's.

    The row-block form needs most of one wave of blocks; few tokens take the split form, and so do
    R > 128, or R > 256 in half precision on Hopper.
    """
    config = _row_block(problem, device)
    return RowBlock(config) if config is not None else split_form(problem, device)


def _row_block(problem: Problem, device: Device) -> LaunchConfig | None:
    """Return the tallest row block of which most SMs get one; None if there is none."""
    for config in row_blocks(problem, device):
        if 4 * cdiv(problem.num_tokens, config.block_t) >= 3 * device.num_sms:
            return config
    return None


def row_blocks(problem: Problem, device: Device) -> list[LaunchConfig]:
    """Return the row blocks for a problem, the tallest first.

    Those of half precision were measured, on an H200 (docs/performance.md): four warps are one
    `wgmma` tall, and two or three such blocks an SM wait for each other less than one of eight.
    """
    bottleneck = problem.bottleneck_size
    block_r = _power_of_two(bottleneck, (16, 32, 64, 128, 256))
    if bottleneck > (256 if problem.plain and device.hopper else 128):
        return []
    if problem.ieee:
        block_h = 16 if block_r == 128 else 32  # for registers
        return [LaunchConfig(32, block_h, block_r, 8, 2)]
    if not problem.plain:
        short = block_r in (16, 128)
        block_h = 32 if problem.wide or block_r == 128 else 64
        warps = 4 if block_r == 16 else 8
        return [LaunchConfig(64 if short else 128, block_h, block_r, warps, 4)]
    if block_r == 256:  # each block reads the weights from L2: a short one reads too much
        return [LaunchConfig(128, 64, block_r, 8, 4, most_out_stages=4)]
    two = 1 if device.small else 2
    blocks = [LaunchConfig(64, 64, block_r, 4, 5, two, most_out_stages=5)]
    if 4 * problem.hidden_size * block_r <= MOST_WEIGHTS_OF_SHORT_BLOCKS:
        blocks.append(LaunchConfig(32, 128, block_r, 4, 4, two, most_out_stages=4))
        block_h = 128 if block_r == 128 or device.small else 256  # for registers and room
        blocks.append(LaunchConfig(16, block_h, block_r, 4, 4, most_out_stages=4))
    return blocks


def split_form(problem: Problem, device: Device) -> Split:
    """Return the split form, whose tiles of half precision were measured as those above were."""
    tokens, bottleneck = problem.num_tokens, problem.bottleneck_size
    few = tokens <= 16
    if problem.ieee:
        block_t, block_r = 16 if few else 32, _power_of_two(bottleneck, (16, 64))
        narrow = LaunchConfig(block_t, 32, block_r, 8, 2)
        units = block_r if bottleneck <= block_r else 32  # short sums: see `plus_product`
        widen = replace(narrow, block_h=64, block_r=units)
        return split_plan(problem, device, narrow, widen, 1)
    block_t, block_r = 16 if few else 64, _power_of_two(bottleneck, (16, 64, 128))
    warps = 4 if problem.plain or block_r < 128 else 8
    narrow = LaunchConfig(block_t, 32 if problem.wide else 64, block_r, warps, 6)
    if bottleneck <= 256 and problem.plain and device.hopper:
        units = _power_of_two(bottleneck, (16, 64, 128, 256))
    else:
        units = block_r if bottleneck <= block_r else 64  # a comes with each tile of features
    block_t = 16 if few else 64 if tokens > 1024 or not problem.plain else 32
    if problem.plain:
        block_h = 128 if block_t > 16 and units < 128 else 64
    else:
        block_h = 64 if problem.wide or units < 128 else 32
    widen = LaunchConfig(block_t, block_h, units, 4 if few or problem.plain else 8, 3)
    return split_plan(problem, device, narrow, widen, 1)


def split_plan(
    problem: Problem, device: Device, narrow: LaunchConfig, widen: LaunchConfig, programs: int
) -> Split:
    """Cut H into slices for at most `programs` an SM of the first kernel, and twice as many of the
    second, whose programs are shorter.

    More than 8 slices of the first cost more in partial sums than their parallel work gains, and so
    do a slice under four tiles and any slice of a wide bottleneck, whose sums are as large as x.
    """
    tokens, hidden, bottleneck = problem[:3]
    into = cdiv(tokens, narrow.block_t) * cdiv(bottleneck, narrow.block_r)
    most = 1 if bottleneck > narrow.block_r else 8
    splits = min(programs * device.num_sms // into, hidden // (4 * narrow.block_h), most)
    out = 2 * programs * device.num_sms // cdiv(tokens, widen.block_t)
    return Split(
        narrow,
        widen,
        *_slices(hidden, max(1, splits), narrow.block_h),
        _slices(hidden, max(1, out), widen.block_h)[1],
    )


def split_bytes(problem: Problem, plan: Split) -> tuple[int, int]:
    """Return the bytes that the forward's two kernels move between L2 and the SMs: x, the weights,
    the partial sums, y. The backward's are the same, with z and dz beside them."""
    tokens, hidden, bottleneck = problem[:3]
    narrow, widen, element = plan.narrow, plan.widen, 4 if problem.wide else 2
    sums = tokens * bottleneck * (4 * plan.num_splits if plan.num_splits > 1 else element)
    into = element * (
        tokens * hidden * cdiv(bottleneck, narrow.block_r)
        + bottleneck * hidden * cdiv(tokens, narrow.block_t)
    )
    one_tile = bottleneck <= widen.block_r  # else every tile of features adds up the sums
    repeats = cdiv(hidden, plan.features_per_program if one_tile else widen.block_h)
    out = element * hidden * (2 * tokens + bottleneck * cdiv(tokens, widen.block_t))
    return into + sums, out + sums * repeats


@functools.lru_cache(maxsize=4096)
def weight_gradient_plan(problem: Problem, device: Device) -> WeightGradient:
    """Plan both weight gradients: tiles over [H, R], in as many token slices as give most SMs a
    program. More slices hide more latency, but cost more in partial sums than that gains.
    """
    bottleneck = problem.bottleneck_size
    if problem.ieee:
        config = LaunchConfig(32, 64, _power_of_two(bottleneck, (16, 32)), 8, 2)
    elif problem.plain and device.large:
        config = LaunchConfig(64, 64, _power_of_two(bottleneck, (16, 64, 128)), 8, 4)
    else:
        config = LaunchConfig(32, 64, _power_of_two(bottleneck, (16, 64)), 8, 4)
    return weights_plan(problem, device, config, 1)


def weights_plan(
    problem: Problem, device: Device, kernel: LaunchConfig, programs: int
) -> WeightGradient:
    """Cut the tokens into as many slices as give at most `programs` an SM."""
    tokens, hidden, bottleneck = problem[:3]
    tiles = cdiv(hidden, kernel.block_h) * cdiv(bottleneck, kernel.block_r)
    # A slice under 4 tiles of tokens costs more in partial sums than its parallel work gains.
    most = max(1, tokens // (4 * kernel.block_t))
    wanted = max(1, min(programs * device.num_sms // tiles, most))
    return WeightGradient(kernel, *_slices(tokens, wanted, kernel.block_t))


# The sum of the partial weight gradients: eight slices a load, and small tiles, because loads are
# all it does.
SUM = LaunchConfig(8, 8, 16, 2, 2)
