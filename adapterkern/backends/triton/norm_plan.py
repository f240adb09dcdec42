"""Launch configurations of the kernels with a norm: pure functions, as those of `launch_config`.

None of these tiles has been measured. `row_block` decides whether the kernel of the sum normalises
it too: what its programs at work read again has to stay in L2.
"""

from dataclasses import replace

from adapterkern.backends.triton.launch_config import (
    MOST_WEIGHTS_OF_SHORT_BLOCKS,
    Device,
    LaunchConfig,
    Problem,
    cdiv,
)

# The part of L2 that keeps rows for a second read, as in `traffic.L2_KEEPS`: its two partitions
# hold copies of each other's lines.
L2_SHARE = 0.6
SHORTEST_BLOCK = 32  # tokens; with fewer, L2 moves more bytes of weights than a fused norm saves
WIDEST_TILE = 2048  # elements of a short block: a thread holds several tiles in float32
MOST_UNITS = 8192  # of a row block, tokens times BLOCK_R: twice as many leave no registers
SUM = LaunchConfig(64, 32, 1, 4, 1)  # of the programs' partial sums: 64 of them a load


def row_block(
    config: LaunchConfig, problem: Problem, device: Device, row_bytes: int
) -> tuple[LaunchConfig, int] | None:
    """Return the row block for a call with a norm, and how many programs take turns over the rows:
    one an SM, of eight warps, for whose registers the statistics need room.

    The block is the tallest, at most that of the plan without a norm, that leaves registers, and of
    which one an SM fits into L2; None if there is none.

    Args:
        config: the kernel of the plan without a norm.
        row_bytes: of an element each of the tensors [T, H] that pass between two reads of one.
    """
    tokens, hidden = problem.num_tokens, problem.hidden_size
    few_weights = 4 * hidden * config.block_r <= MOST_WEIGHTS_OF_SHORT_BLOCKS
    block_t = config.block_t
    while block_t == config.block_t or (block_t >= SHORTEST_BLOCK and few_weights):
        programs = min(cdiv(tokens, block_t), device.num_sms)
        at_work = programs * block_t * hidden * row_bytes
        if at_work <= L2_SHARE * device.l2 and block_t * config.block_r <= MOST_UNITS:
            # Tiles of float32, addresses of ragged rows, and wide products take more registers.
            roomy = problem.plain and config.block_r < 128
            block_h = min(config.block_h, max(64 if roomy else 32, WIDEST_TILE // block_t))
            kernel = replace(config, block_t=block_t, block_h=block_h, num_warps=8, blocks_per_sm=1)
            return kernel, programs
        block_t //= 2
    return None


def rows(num_tokens: int, hidden_size: int, device: Device) -> tuple[LaunchConfig, int]:
    """Return the tile of the kernels that have rows to themselves, and the most programs that take
    turns over them where each adds up its own sums. Few tokens get a program each.
    """
    block_t = 1
    while block_t < 16 and 2 * block_t * device.num_sms <= num_tokens:
        block_t *= 2
    block_h = 128
    while block_h < min(hidden_size, 4096 // block_t, 1024):
        block_h *= 2
    return LaunchConfig(block_t, block_h, 1, 4, 2), min(
        cdiv(num_tokens, block_t), 2 * device.num_sms
    )


def row_stages(config: LaunchConfig, device: Device, row_bytes: int, weight_bytes: int = 0) -> int:
    """Return the stages of a loop over rows: at most 3, as many as shared memory holds.

    Args:
        row_bytes: of an element each of the tensors [T, H] that the loop reads, all together.
        weight_bytes: of an element of the weight whose product the loop computes, if any.
    """
    tile = config.block_h * (config.block_t * row_bytes + config.block_r * weight_bytes)
    # A factor of the product that was computed, and sums over the tokens, go through it too.
    room = device.shared_memory // config.blocks_per_sm - 8 * config.block_h * config.block_t
    return max(1, min(3, room // tile))
