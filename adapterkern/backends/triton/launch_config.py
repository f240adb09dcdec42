"""Launch configurations are a pure function of (problem, device): no run stops to autotune.

Every tile compiles within the registers and the shared memory of each architecture from sm_80 to
sm_120, as tests/test_triton_compile.py checks. The number of row blocks that fill the GPU decides
which form runs. No number here has been tuned on a GPU yet.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and launch options of one kernel."""

    block_t: int
    block_h: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowBlock:
    """One program owns a row block and all of R."""

    kernel: LaunchConfig


@dataclass(frozen=True)
class Split:
    """Two kernels: into the bottleneck (summed over `num_splits` slices of H), and out of it."""

    narrow: LaunchConfig
    widen: LaunchConfig
    num_splits: int
    features_per_split: int


@dataclass(frozen=True)
class WeightGradient:
    """Partial sums over `num_splits` slices of the tokens."""

    kernel: LaunchConfig
    num_splits: int
    tokens_per_split: int


# The sum of the partial weight gradients runs with this.
SUM = LaunchConfig(block_t=1, block_h=32, block_r=32, num_warps=4, num_stages=2)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _power_of_two(size: int, choices: tuple[int, ...]) -> int:
    """The smallest of `choices` that holds `size`, or the largest if none does.

    16 is the narrowest tensor-core tile. Few choices keep the number of distinct kernels small.
    """
    return next((choice for choice in choices if size <= choice), choices[-1])


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
        config = LaunchConfig(32, 32, block_r, 8, 2)
    else:
        # Each row block reads the weights from L2: (2 + 2R/BLOCK_T) passes over x, balanced at
        # BLOCK_T = 2R.
        block_t = 64 if block_r == 16 or (problem.wide and block_r == 128) else 128
        stages = 2 if problem.wide or (device.small and block_r == 128) else 3
        config = LaunchConfig(
            block_t, 32 if problem.wide else 64, block_r, 4 if block_r == 16 else 8, stages
        )
    return config if 4 * cdiv(problem.num_tokens, config.block_t) >= 3 * device.num_sms else None


def _split(problem: Problem, device: Device) -> Split:
    tokens, hidden, bottleneck = problem.num_tokens, problem.hidden_size, problem.bottleneck_size
    if problem.ieee:
        block_t = 16 if tokens <= 16 else 32
        narrow = LaunchConfig(block_t, 32, _power_of_two(bottleneck, (16, 64)), 8, 2)
        widen = LaunchConfig(block_t, 64, _power_of_two(bottleneck, (16, 32)), 8, 2)
    else:
        block_t = 16 if tokens <= 16 else 64
        if bottleneck > ROW_BLOCK_MAX_R and tokens >= 64 * device.num_sms and not problem.wide:
            block_t = 128
        stages = 2 if problem.wide else 3
        block_r = _power_of_two(bottleneck, (16, 64, 128))
        block_h = 32 if problem.wide else 64
        narrow = LaunchConfig(block_t, block_h, block_r, 8 if block_r == 128 else 4, stages)
        widen = LaunchConfig(
            block_t, max(64, block_t), min(block_r, 64), 8 if block_t == 128 else 4, stages
        )
    # There are as many slices of H as give two programs an SM, each of four tiles or more.
    programs = cdiv(tokens, narrow.block_t) * cdiv(bottleneck, narrow.block_r)
    most = max(1, hidden // (4 * narrow.block_h))
    splits = max(1, min(2 * device.num_sms // programs, most))
    features = cdiv(cdiv(hidden, splits), narrow.block_h) * narrow.block_h
    return Split(narrow, widen, cdiv(hidden, features), features)


@functools.lru_cache(maxsize=4096)
def weight_gradient_plan(problem: Problem, device: Device) -> WeightGradient:
    """Plan both weight gradients: tiles over [H, R], in as many token slices as fill the GPU."""
    tokens, hidden, bottleneck = problem.num_tokens, problem.hidden_size, problem.bottleneck_size
    if problem.ieee:
        config = LaunchConfig(32, 64, _power_of_two(bottleneck, (16, 32)), 8, 2)
    else:
        block_h = 128 if device.shared_memory > 200 * 1024 and not problem.wide else 64
        config = LaunchConfig(
            32, block_h, _power_of_two(bottleneck, (16, 64)), 8, 2 if problem.wide else 3
        )
    tiles = cdiv(hidden, config.block_h) * cdiv(bottleneck, config.block_r)
    # A slice under 8 tiles of tokens costs more in partial sums than its parallel work gains.
    most = max(1, tokens // (8 * config.block_t))
    splits = max(1, min(2 * device.num_sms // tiles, most))
    length = cdiv(cdiv(tokens, splits), config.block_t) * config.block_t
    return WeightGradient(config, cdiv(tokens, length), length)
