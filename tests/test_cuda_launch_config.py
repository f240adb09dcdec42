"""How the CUDA backend cuts problems into launches."""

import itertools

import pytest

from adapterkern.backends.cuda import launch_config
from adapterkern.backends.cuda.facts import PANEL, SMALL_MEMORY, Device, Problem
from adapterkern.backends.cuda.launch_config import (
    CLUSTER_EXCHANGE,
    CLUSTER_FEATURES,
    CLUSTER_SIZES,
    FEW_STAGES,
    MANY_STAGES,
    MEMORY_UNIT,
    NO_SLICES,
    SHARED_STAGES,
    SLICE_FEATURES,
    SLICE_TOKENS,
    SPLIT_TRAFFIC,
    SYSTEM_MEMORY,
    TOKEN_STEP,
    Slices,
    TokenPlan,
    cdiv,
    row_block_plan,
    split_passes,
    token_plan,
    token_slices,
    token_stages,
)

MEMORY = 227 * 1024  # of a block, on compute capability 9.0 and 10.0
DEVICES = [
    *(Device(num_sms=sms) for sms in (1, 20, 108, 132, 170)),
    *(Device(num_sms=sms, cluster_memory=MEMORY, memory=MEMORY) for sms in (2, 132, 148)),
    Device(num_sms=108, memory=163 * 1024),
    Device(num_sms=16, cluster_memory=MEMORY, cluster_sizes=(2,)),
]
PROBLEMS = [
    Problem(tokens, hidden, bottleneck, half)
    for tokens, hidden, bottleneck, half in itertools.product(
        (1, 3, 16, 100, 2048, 4097, 65536, 1 << 22),
        (1, 70, 768, 1024, 8192, 16384),
        (1, 16, 48, 64, 128, 256),
        (False, True),
    )
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_slices_cover_everything_once_and_stay_within_the_grid(device):
    for problem in PROBLEMS:
        for slices, size, step in (
            (token_plan(problem, device).slices, problem.hidden_size, PANEL),
            (token_plan(problem, device).output_slices, problem.hidden_size, PANEL),
            (token_slices(problem, device), problem.num_tokens, TOKEN_STEP),
        ):
            if slices == NO_SLICES:
                continue
            assert slices.length % step == 0
            assert size <= slices.number * slices.length
            if slices.number not in CLUSTER_SIZES:  # blocks of a cluster may have no features
                assert (slices.number - 1) * slices.length < size
            assert slices.number <= 65535


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_row_block_form_needs_most_of_one_wave(device):
    for problem in PROBLEMS:
        plan = token_plan(problem, device)
        blocks = cdiv(problem.num_tokens, shape_of(problem, device).tokens)
        fills = blocks >= 0.75 * device.num_sms
        assert fills if plan.slices == NO_SLICES else not fills or plan.num_clusters


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_clusters_stay_within_what_the_device_and_the_kernels_have(device):
    for problem in PROBLEMS:
        plan = token_plan(problem, device)
        if plan.num_clusters == 0:
            assert plan.cluster_tokens == 0
            continue
        size, length = plan.slices
        assert size in (device.cluster_sizes or CLUSTER_SIZES)
        assert plan.cluster_tokens in (16, 64)
        assert problem.half
        assert problem.bottleneck_size <= 128
        assert problem.hidden_size >= size * CLUSTER_FEATURES
        fact = launch_config.facts().cluster(problem, plan.cluster_tokens)
        assert fact.bytes_for(length) <= device.cluster_memory
        assert plan.num_clusters <= cdiv(problem.num_tokens, plan.cluster_tokens)
        assert plan.num_clusters * size <= device.num_sms or plan.num_clusters == 1
        if plan.cluster_tokens == 64:
            exchanged = 1.5 * problem.bottleneck_size * (size - 1) / problem.hidden_size
            split = launch_config._split(problem, device).slices
            of_split = shape_of(problem, device).tokens * split.length
            fast = 2 * launch_config._busiest(problem, plan) < of_split
            assert exchanged <= CLUSTER_EXCHANGE or fast


ROW_BLOCK = TokenPlan(NO_SLICES, large_tiles=True)


@pytest.mark.parametrize(
    ("problem", "plan"),
    [
        (Problem(16384, 1024, 64, True), ROW_BLOCK),  # nearly one whole wave
        (Problem(17000, 1024, 64, True), TokenPlan(Slices(4, 256), 33, 64)),  # one block beyond it
        (Problem(2048, 1024, 64, True), TokenPlan(Slices(4, 256), 32, 64)),
        (Problem(1, 1024, 64, True), TokenPlan(Slices(8, 128), 1, 16)),
        (Problem(16, 4096, 64, True), TokenPlan(Slices(8, 512), 1, 16)),
        (Problem(16384, 4096, 64, True), ROW_BLOCK),  # too wide for a cluster
        (Problem(16384, 1024, 112, True), ROW_BLOCK),  # too much to exchange
        # Two kernels over slices of H would use 32 SMs.
        (Problem(2048, 1024, 112, True), TokenPlan(Slices(8, 128), 16, 64)),
        (Problem(16384, 1024, 64, False), ROW_BLOCK._replace(large_tiles=False)),  # float32
        (
            Problem(2048, 4096, 64, True),
            TokenPlan(Slices(7, 640), output_slices=Slices(7, 640), large_tiles=True, width=64),
        ),
    ],
    ids=str,
)
def test_form_on_an_h200(problem, plan):
    assert token_plan(problem, Device(132, MEMORY))._replace(shared_bytes=0) == plan


def shape_of(problem, device):
    return launch_config.facts().row_block(problem, device)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("added", [0, 1, 2])
def test_a_block_has_the_shared_memory_that_its_pipelines_can_use(device, added):
    """Blocks share an SM where their pipelines stay deep; otherwise each has all the memory."""
    most = launch_config.facts().most_stages
    for problem in PROBLEMS:
        problem = problem._replace(added=added)
        fact, found = shape_of(problem, device), row_block_plan(problem, device).shared_bytes
        assert fact.least_bytes <= found <= device.block_memory
        assert found <= fact.bytes_for(most, added)
        if found < min(device.block_memory, fact.bytes_for(most, added)):
            assert found >= fact.bytes_for(SHARED_STAGES, added)
            number = (device.block_memory + SYSTEM_MEMORY) // (found + SYSTEM_MEMORY)
            blocks = cdiv(problem.num_tokens, fact.tokens)
            assert 2 <= number <= fact.blocks_per_sm
            assert blocks > (number - 1) * device.num_sms
            taken = cdiv(found, MEMORY_UNIT) * MEMORY_UNIT + SYSTEM_MEMORY
            assert number * taken <= device.block_memory + SYSTEM_MEMORY


def test_large_tiles_are_for_devices_with_room_for_them():
    problem = Problem(1 << 20, 4096, 64, True)
    small, large = (row_block_plan(problem, device) for device in (Device(132), DEVICES[-1]))
    assert (small.large_tiles, large.large_tiles) == (False, True)
    assert not row_block_plan(problem, Device(108, memory=163 * 1024)).large_tiles


@pytest.mark.parametrize(
    ("bottleneck", "added"), [(16, 1), (16, 2), (64, 1), (64, 2), (128, 1), (256, 1)]
)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_is_added_fits_two_stages_of_every_gpu(device, bottleneck, added):
    """Otherwise the kernels would load it element by element."""
    problem = Problem(1 << 20, 4096, bottleneck, True, added)
    found = row_block_plan(problem, device).shared_bytes
    assert found >= shape_of(problem, device).bytes_for(2, added)


SPLIT_SIZES = itertools.product(
    (16, 64, 100, 256, 500, 1024, 2048, 4096), (768, 1024, 2048, 4096, 8192), (16, 32, 64, 128, 256)
)


def test_split_form_moves_at_most_three_passes_through_l2_where_it_can():
    """A pass is x and y. Without partial sums, x and y are at least one and a half; the weights
    make several where tokens are few or the bottleneck is wide."""
    device, split, within = Device(132, MEMORY), 0, 0
    for tokens, hidden, bottleneck in SPLIT_SIZES:
        problem = Problem(tokens, hidden, bottleneck, True)
        plan = token_plan(problem, device)
        if plan.output_slices == NO_SLICES:
            continue
        fact = shape_of(problem, device)
        passes = split_passes(problem, fact, plan.slices.number, plan.output_slices.number)
        least = split_passes(problem, fact, 1, 1)
        assert passes <= max(SPLIT_TRAFFIC, 1.5 * least)
        split += 1
        within += passes <= SPLIT_TRAFFIC
        finer = plan.slices.length - PANEL
        more = cdiv(hidden, finer) if finer >= SLICE_FEATURES else hidden
        if more * cdiv(tokens, fact.tokens) <= device.num_sms:  # it took as many as it may
            assert split_passes(problem, fact, more, more) > SPLIT_TRAFFIC
    assert split > 60
    assert within > 25


def test_no_slice_is_shorter_than_it_is_worth():
    without_clusters = (device for device in DEVICES if device.cluster_memory == 0)
    for problem, device in itertools.product(PROBLEMS, without_clusters):
        for slices, shortest in (
            (token_plan(problem, device).slices, SLICE_FEATURES),
            (token_slices(problem, device), SLICE_TOKENS),
        ):
            assert slices.number <= 1 or slices.length >= shortest


def test_few_tokens_of_a_wide_model_are_cut_over_h():
    assert token_plan(Problem(1, 4096, 64, True), Device(132)).slices == Slices(32, 128)
    assert token_plan(Problem(1, 100, 64, True), Device(132)).slices == Slices(1, 128)


def gradient_blocks(problem: Problem, device: Device) -> int:
    fact = launch_config.facts().gradient(problem)
    tiles = cdiv(problem.hidden_size, fact.features) * cdiv(problem.bottleneck_size, fact.units)
    return 2 * tiles * token_slices(problem, device).number


@pytest.mark.parametrize("hidden", [768, 1024, 2048, 4096, 5120, 8192])
def test_weight_gradients_of_many_tokens_take_one_wave_of_one_block_an_sm(hidden):
    blocks = gradient_blocks(Problem(16384, hidden, 64, True), Device(132, MEMORY, MEMORY))
    assert 0.9 * 132 <= blocks <= 132


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_weight_gradients_are_cut_over_the_tokens_only_within_one_wave(device):
    for problem in PROBLEMS:
        if token_slices(problem, device).number > 1:
            assert gradient_blocks(problem, device) <= device.num_sms


@pytest.mark.parametrize("hidden", [1024, 4096])
@pytest.mark.parametrize("bottleneck", [16, 64, 128])
def test_weight_gradients_move_little_more_than_x_and_dy(hidden, bottleneck):
    """Beyond x and dy, read once: the partial sums, written and read once each; and dz and a, which
    come from L2, once for every block of features."""
    problem = Problem(16384, hidden, bottleneck, True)
    slices = token_slices(problem, Device(132, MEMORY, MEMORY)).number
    fact = launch_config.facts().gradient(problem)
    assert bottleneck <= fact.units
    tensors = 2 * 2 * 16384 * hidden
    partial = slices * 2 * bottleneck * hidden * 4
    assert 2 * partial <= 0.26 * tensors * bottleneck / 64
    of_units = 2 * 2 * 16384 * bottleneck * cdiv(hidden, fact.features)
    assert of_units <= 0.25 * tensors * bottleneck / 64


def test_stages_of_the_weight_gradients_follow_the_shared_memory():
    for problem in PROBLEMS:
        for memory in (SMALL_MEMORY, 163 * 1024, MEMORY):
            stages = token_stages(problem, Device(132, 0, memory))
            assert stages * launch_config.facts().gradient(problem).stage_bytes <= memory
            assert stages == (FEW_STAGES if memory == SMALL_MEMORY else MANY_STAGES)


@pytest.mark.parametrize(
    ("memory", "bandwidth", "num_sms"),
    [(MEMORY, 4.3e12, 132), (163 * 1024, 1.8e12, 108), (SMALL_MEMORY, 1.0e12, 84)],
    ids=["H200", "A100", "8.6 to 12.0"],
)
def test_weight_gradients_keep_enough_bytes_under_way(memory, bandwidth, num_sms):
    """All stages but one are under way, and a byte takes about a microsecond."""
    for bottleneck in (16, 64, 128):
        problem = Problem(16384, 4096, bottleneck, True)
        stages = token_stages(problem, Device(num_sms, 0, memory))
        under_way = launch_config.facts().gradient(problem).stage_bytes * (stages - 1)
        assert under_way >= 1e-6 * bandwidth / num_sms
