"""Launch configurations are a pure function of (problem, device): no run stops to autotune.

Every tile compiles within the registers and the shared memory of each architecture from sm_80 to
sm_120, as tests/test_triton_compile.py checks. The number of row blocks that fill the GPU decides
which form runs, the bytes that it moves how it is cut into slices. No number here has been tuned on
a GPU yet.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

MOST_REGISTERS = 255  # that a thread can have
ROW_BLOCK_MAX_R = 128  # above it z and a do not fit one program's registers beside the tiles


@dataclass(frozen=True)
class Device:
    """The properties of a GPU on which a configuration may depend."""

    num_sms: int
    shared_memory: int  # bytes one block may use (opt-in limit)

    @property
    def small(self) -> bool:
        """The 99 KB class: compute capability 8.6, 8.9 and 12.x."""
        return self.shared_memory < 160 * 1024


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


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of one kernel.

    blocks_per_sm: how many of its blocks the plan counts on an SM to hold at once, which registers
    and shared memory must allow; max_registers: what the compiler may give a thread to that end.
    """

    block_t: int
    block_h: int
    block_r: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int = 1
    max_registers: int = MOST_REGISTERS

    @property
    def maxnreg(self) -> int | None:
        """The bound in Triton's terms, which has None where there is none."""
        return None if self.max_registers == MOST_REGISTERS else self.max_registers


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


def _stages(problem: Problem, device: Device, elements: int, blocks_per_sm: int) -> int:
    """As many stages, up to four, as `blocks_per_sm` blocks have shared memory for, with `elements`
    in a stage: three tiles of 16 KB under way cover the time that memory takes at 4 TB/s.

    On a large GPU one of these plans also serves calls whose tensors are float32 beside products in
    half precision, of which one block must fit.
    """
    element = 4 if problem.wide else 2
    room = device.shared_memory // blocks_per_sm - 8 * 1024  # for changes of layout
    fit = room // (element * elements)
    if not device.small:
        fit = min(fit, device.shared_memory // (4 * elements))
    return max(2, min(4, fit))


def out_stages(
    config: LaunchConfig, device: Device, row_bytes: int, weight_bytes: int, output_bytes: int
) -> int:
    """Stages of the loop that leaves the bottleneck: 3, or as many as shared memory holds.

    Args:
        row_bytes: of one element each of the tensors [T, H] that the loop reads, all together.
        weight_bytes, output_bytes: of an element of its weight, and of its output.
    """
    rows, weight = config.block_t * config.block_h, config.block_r * config.block_h
    for stages in (3, 2):
        tiles = stages + weight_bytes // 4  # TF32 and conversion take one more
        loads = (stages - 1) * rows * row_bytes + tiles * weight * weight_bytes
        # The output changes its layout there too: what the compiler took for that at most, on sm_80
        # and sm_90 and in every mix of types.
        if loads + rows * (2 + output_bytes) + 1024 <= device.shared_memory:
            return stages
    return 1


def sum_stages(config: LaunchConfig, device: Device) -> int:
    """Stages of the loop that adds up partial sums: 4, or as many as shared memory holds."""
    return min(4, 1 + device.shared_memory // (4 * config.block_t * config.block_r))


@functools.lru_cache(maxsize=4096)
def token_plan(problem: Problem, device: Device) -> RowBlock | Split:
    """Plan y of the forward, and dz and dx of the backward, whose products mirror the forward's.

    The row-block form needs most of one wave of blocks; few tokens and R > 128 take the split form.
    """
    config = _row_block(problem, device)
    return RowBlock(config) if config is not None else _split(problem, device)


def _row_block(problem: Problem, device: Device) -> LaunchConfig | None:
    if problem.bottleneck_size > ROW_BLOCK_MAX_R:
        return None
    block_r = _power_of_two(problem.bottleneck_size, (16, 32, 64, ROW_BLOCK_MAX_R))
    if problem.ieee:
        config = LaunchConfig(32, 16 if block_r == 128 else 32, block_r, 8, 2)  # for registers
    else:
        # Each row block reads the weights from L2: (2 + 2R/BLOCK_T) passes over x, balanced at
        # BLOCK_T = 2R.
        short = block_r == 128 and (problem.wide or problem.ragged)
        block_t = 64 if block_r == 16 or short else 128
        block_h = 32 if problem.wide else 64
        stages = _stages(problem, device, (block_t + block_r) * block_h, 1)
        config = LaunchConfig(block_t, block_h, block_r, 4 if block_r == 16 else 8, stages)
    return config if 4 * cdiv(problem.num_tokens, config.block_t) >= 3 * device.num_sms else None


def _split(problem: Problem, device: Device) -> Split:
    """Return the plan of the tiles by which the kernels move the fewest bytes."""
    tokens, bottleneck = problem.num_tokens, problem.bottleneck_size
    if problem.ieee:
        block_t, block_r = 16 if tokens <= 16 else 32, _power_of_two(bottleneck, (16, 64))
        narrow = LaunchConfig(block_t, 32, block_r, 8, 2)
        return split_plan(problem, device, narrow, replace(narrow, block_h=64), 1)
    plans = []
    block_r = _power_of_two(bottleneck, (16, 64, 128))
    short = problem.wide or (block_r == 128 and problem.ragged)  # for registers
    for block_t in (16,) if tokens <= 16 else (64,) if short else (64, 128):
        block_h = 32 if problem.wide else 64
        stages = _stages(problem, device, (block_t + block_r) * block_h, 1)
        warps = 8 if max(block_t, block_r) == 128 else 4
        narrow = LaunchConfig(block_t, block_h, block_r, warps, stages)
        long = block_t == 64 and not problem.wide and not problem.ragged
        block_h = 128 if long else 64
        units = block_r if bottleneck <= block_r else 64  # a comes with each tile of features
        widen = LaunchConfig(block_t, block_h, units, 4 if block_t == 16 else 8, 3)
        plans.append(split_plan(problem, device, narrow, widen, 1))
    return min(plans, key=lambda plan: split_cost(problem, device, plan))


def split_plan(
    problem: Problem, device: Device, narrow: LaunchConfig, widen: LaunchConfig, blocks_per_sm: int
) -> Split:
    """Cut H into the slices by which these tiles move the fewest bytes, in at most `blocks_per_sm`
    programs an SM of either kernel."""
    tokens, hidden, bottleneck = problem[:3]
    programs = blocks_per_sm * device.num_sms
    into = cdiv(tokens, narrow.block_t) * cdiv(bottleneck, narrow.block_r)
    # A slice under two tiles costs more in partial sums than its parallel work gains.
    most_splits = max(1, min(programs // into, hidden // (2 * narrow.block_h)))
    most_slices = max(1, min(programs // cdiv(tokens, widen.block_t), hidden // widen.block_h))
    splits = {_slices(hidden, n + 1, narrow.block_h): None for n in range(most_splits)}
    slices = {_slices(hidden, n + 1, widen.block_h)[1]: None for n in range(most_slices)}
    plans = [
        Split(narrow, widen, *split, features)
        for split, features in itertools.product(splits, slices)
    ]
    return min(plans, key=lambda plan: split_cost(problem, device, plan))


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


def split_cost(problem: Problem, device: Device, plan: Split) -> float:
    """Return the bytes of both kernels, weighed by how well their programs fill the GPU.

    All SMs together draw what L2 gives, some 6 TB/s. One alone draws about twice its share of that
    (64 bytes a clock), so half the SMs are enough for it, and fewer cost time.
    """
    tokens, hidden, bottleneck = problem[:3]
    into = cdiv(tokens, plan.narrow.block_t) * cdiv(bottleneck, plan.narrow.block_r)
    out = cdiv(tokens, plan.widen.block_t) * cdiv(hidden, plan.features_per_program)
    cost = 0.0
    for size, programs in zip(
        split_bytes(problem, plan), (into * plan.num_splits, out), strict=True
    ):
        busiest = size * cdiv(programs, device.num_sms) / programs  # the SM with the most programs
        cost += max(size, busiest * device.num_sms / 2)
    return cost


@functools.lru_cache(maxsize=4096)
def weight_gradient_plan(problem: Problem, device: Device) -> WeightGradient:
    """Plan both weight gradients: tiles over [H, R], in as many token slices as fill the GPU."""
    bottleneck = problem.bottleneck_size
    if problem.ieee:
        config = LaunchConfig(32, 64, _power_of_two(bottleneck, (16, 32)), 8, 2, 2)
    else:
        block_r = _power_of_two(bottleneck, (16, 64))
        large = device.shared_memory > 200 * 1024
        block_h = 128 if large and not problem.wide and not problem.ragged else 64
        # wgmma has its operands in shared memory, so two blocks fit the registers of an SM. On the
        # other architectures fragments take up to 255 registers a thread, and 128 would spill; so
        # do the addresses of ragged rows.
        two = large and not problem.ragged
        blocks, registers = (2, 128) if two else (1, MOST_REGISTERS)
        stages = _stages(problem, device, 32 * 2 * (block_h + block_r), blocks)
        config = LaunchConfig(32, block_h, block_r, 8, stages, blocks, registers)
    return weights_plan(problem, device, config, config.blocks_per_sm)


def weights_plan(
    problem: Problem, device: Device, kernel: LaunchConfig, blocks_per_sm: int
) -> WeightGradient:
    """Cut the tokens into as many slices as give at most `blocks_per_sm` programs an SM."""
    tokens, hidden, bottleneck = problem[:3]
    tiles = cdiv(hidden, kernel.block_h) * cdiv(bottleneck, kernel.block_r)
    # A slice under 8 tiles of tokens costs more in partial sums than its parallel work gains.
    most = max(1, tokens // (8 * kernel.block_t))
    wanted = max(1, min(blocks_per_sm * device.num_sms // tiles, most))
    return WeightGradient(kernel, *_slices(tokens, wanted, kernel.block_t))


def sum_config(bottleneck_size: int) -> LaunchConfig:
    """The sum of the partial weight gradients: small tiles, because its loads are all it does."""
    block_r = _power_of_two(bottleneck_size, (16, 32, 64))
    return LaunchConfig(1, 512 // block_r, block_r, 4, 2, 2)
