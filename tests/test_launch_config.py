"""The launch configuration is a pure function: the right form, tiles that cover the problem, full
GPUs.
"""

import itertools

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from adapterkern.backends.triton.launch_config import (
    Device,
    Problem,
    RowBlock,
    Split,
    cdiv,
    gradient_stages,
    into_stages,
    split_bytes,
    token_plan,
    weight_gradient_plan,
)

H200 = Device(num_sms=132, shared_memory=227 * 1024)
RTX_4090 = Device(num_sms=128, shared_memory=99 * 1024)


def problem(tokens, hidden=1024, bottleneck=64, ieee=False, wide=False):
    return Problem(tokens, hidden, bottleneck, ieee, wide)


@pytest.mark.parametrize("tokens", [16384, 65536, 1 << 20])
@pytest.mark.parametrize("bottleneck", [1, 8, 48, 64, 128])
def test_many_tokens_take_row_blocks_that_hold_all_of_r(tokens, bottleneck):
    plan = token_plan(problem(tokens, bottleneck=bottleneck), H200)
    assert isinstance(plan, RowBlock)
    assert plan.kernel.block_r >= bottleneck


@pytest.mark.parametrize(
    ("tokens", "bottleneck"), [(1, 64), (16, 8), (1024, 64), (65536, 257), (65536, 512)]
)
def test_few_tokens_and_wide_bottlenecks_take_the_split_form(tokens, bottleneck):
    assert isinstance(token_plan(problem(tokens, bottleneck=bottleneck), H200), Split)


def test_decode_fills_the_gpu_with_slices_of_h():
    plan = token_plan(problem(1, hidden=8192), H200)
    assert plan.num_splits == 8  # more would cost more in partial sums
    assert cdiv(8192, plan.features_per_program) == 128
    assert token_plan(problem(1), H200).num_splits == 4  # four tiles of 64 features a slice
    assert token_plan(problem(65536, bottleneck=512), H200).num_splits == 1


def compulsory(case) -> int:
    """Bytes of x, y and both weights, each once."""
    return 4 * case.hidden_size * (case.num_tokens + case.bottleneck_size)


@pytest.mark.parametrize("bottleneck", [16, 64, 128, 256])
def test_split_plans_move_few_bytes_through_l2(bottleneck):
    """Three times the compulsory bytes where tokens are many and R is not wide, as each block of
    tokens reads both weights. With few tokens, more: there what counts is how many SMs work."""
    for tokens, hidden in itertools.product(
        (16, 64, 256, 1024, 2048, 4096), (768, 1024, 2048, 4096, 8192)
    ):
        case = problem(tokens, hidden, bottleneck)
        plan = token_plan(case, H200)
        if isinstance(plan, RowBlock):
            continue
        moved = sum(split_bytes(case, plan)) / compulsory(case)
        most = {16: 3.0, 64: 6.0, 128: 14.0, 256: 8.0}[bottleneck]
        if tokens >= 2048:
            most = {16: 2.0, 64: 3.0, 128: 5.5, 256: 6.5}[bottleneck]
        assert moved <= most, (tokens, hidden, moved)


@pytest.mark.parametrize("hidden", [2048, 4096, 8192])
def test_split_plans_fill_the_gpu_where_there_is_work_for_it(hidden):
    """One program an SM into the bottleneck, and two out of it, as was measured to be best."""
    for tokens in (1024, 2048, 4096):
        plan = token_plan(problem(tokens, 2 * hidden), H200)
        into = cdiv(tokens, plan.narrow.block_t) * plan.num_splits
        out = cdiv(tokens, plan.widen.block_t) * cdiv(2 * hidden, plan.features_per_program)
        assert 120 <= into <= 132, (tokens, hidden)
        assert 240 <= out <= 264, (tokens, hidden)


@pytest.mark.parametrize("device", [H200, RTX_4090], ids=["h200", "4090"])
@pytest.mark.parametrize("ieee", [False, True], ids=["tensor", "ieee"])
def test_slices_cover_hidden_size_and_tokens_exactly_once(device, ieee):
    sizes = itertools.product(
        (1, 17, 777, 2048, 4097, 30011), (1, 100, 768, 8192), (1, 5, 48, 200, 1024)
    )
    for tokens, hidden, bottleneck in sizes:
        case = problem(tokens, hidden, bottleneck, ieee, wide=ieee)
        plan = token_plan(case, device)
        if isinstance(plan, Split):
            assert plan.features_per_split % plan.narrow.block_h == 0
            assert cdiv(hidden, plan.features_per_split) == plan.num_splits
            assert plan.features_per_program % plan.widen.block_h == 0
        weights = weight_gradient_plan(case, device)
        assert weights.tokens_per_split % weights.kernel.block_t == 0
        assert cdiv(tokens, weights.tokens_per_split) == weights.num_splits


def test_weight_gradient_partial_sums_stay_small():
    """The float32 partials of both weights stay under 40 MB and under the activations they come
    from.
    """
    for tokens, hidden, bottleneck in itertools.product(
        (4096, 16384, 65536), (768, 4096, 8192), (16, 64, 256, 1024)
    ):
        plan = weight_gradient_plan(problem(tokens, hidden, bottleneck), H200)
        if plan.num_splits > 1:
            assert plan.num_splits * 2 * hidden * bottleneck * 4 < 40 * 2**20


@pytest.mark.parametrize(("hidden", "shortest"), [(1024, 16), (2048, 16), (4096, 64)])
def test_row_blocks_start_where_they_fill_three_quarters_of_the_gpu(hidden, shortest):
    """Short ones only where reading both weights takes a block little time."""
    tokens = shortest * 98 + 1  # 99 row blocks on 132 SMs
    plan = token_plan(problem(tokens, hidden), H200)
    assert isinstance(plan, RowBlock)
    assert plan.kernel.block_t == shortest
    assert isinstance(token_plan(problem(tokens - 1, hidden), H200), Split)
    assert isinstance(token_plan(problem(tokens - 1, hidden), RTX_4090), RowBlock)  # 128 SMs


def test_row_blocks_are_as_tall_as_fills_the_gpu():
    heights = {t: token_plan(problem(t), H200).kernel.block_t for t in (2048, 4096, 8192, 65536)}
    assert heights == {2048: 16, 4096: 32, 8192: 64, 65536: 64}
    assert token_plan(problem(16384, 4096, 256), H200).kernel.block_t == 128


def test_stages_give_way_to_the_tensors_of_the_call():
    """A plan of half precision also serves float32 weights and a float32 dy, in fewer stages."""
    config = token_plan(problem(16384, 4096, 256), H200).kernel
    assert into_stages(config, H200, 2, 2) == config.num_stages == 4
    assert into_stages(config, H200, 4, 4) == 2
    gradients = weight_gradient_plan(problem(16384, 4096, 256), H200).kernel
    assert gradient_stages(gradients, H200, 4, 4) == gradients.num_stages == 4
    assert gradient_stages(gradients, H200, 6, 4) == 3
