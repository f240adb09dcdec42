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
    ("tokens", "bottleneck"), [(1, 64), (16, 8), (2048, 64), (65536, 129), (65536, 512)]
)
def test_few_tokens_and_wide_bottlenecks_take_the_split_form(tokens, bottleneck):
    assert isinstance(token_plan(problem(tokens, bottleneck=bottleneck), H200), Split)


def test_decode_fills_the_gpu_with_slices_of_h():
    plan = token_plan(problem(1, hidden=8192), H200)
    assert plan.num_splits == 64  # two tiles of 64 features a slice
    assert cdiv(8192, plan.features_per_program) == 64
    assert token_plan(problem(65536, bottleneck=512), H200).num_splits == 1


def compulsory(case) -> int:
    """Bytes of x, y and both weights, each once."""
    return 4 * case.hidden_size * (case.num_tokens + case.bottleneck_size)


@pytest.mark.parametrize("bottleneck", [16, 64, 128, 256])
def test_split_plans_move_few_bytes_through_l2(bottleneck):
    """Three times the compulsory bytes where tokens are many and R is not wide, as each block of
    tokens reads both weights. With few tokens, more: there they are far from filling the GPU, and
    the time goes by the bytes of the busiest SM."""
    for tokens, hidden in itertools.product(
        (16, 64, 256, 1024, 2048, 4096), (768, 1024, 2048, 4096, 8192)
    ):
        case = problem(tokens, hidden, bottleneck)
        plan = token_plan(case, H200)
        moved = sum(split_bytes(case, plan)) / compulsory(case)
        most = {16: 4.1, 64: 5.4, 128: 6.0, 256: 8.2}[bottleneck]
        if tokens >= 2048:
            most = {16: 2.0, 64: 3.0, 128: 4.3, 256: 6.5}[bottleneck]
        assert moved <= most, (tokens, hidden, moved)


def test_split_plans_use_at_least_half_of_the_gpu_where_there_is_work_for_it():
    for tokens, hidden in itertools.product((1024, 2048, 4096), (1024, 4096, 8192)):
        plan = token_plan(problem(tokens, hidden), H200)
        into = cdiv(tokens, plan.narrow.block_t) * plan.num_splits
        out = cdiv(tokens, plan.widen.block_t) * cdiv(hidden, plan.features_per_program)
        assert 132 // 2 - 2 <= into <= 132, (tokens, hidden)
        assert 132 // 2 - 2 <= out <= 132, (tokens, hidden)


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


def test_row_blocks_start_where_they_fill_three_quarters_of_the_gpu():
    tokens = 128 * 99  # 99 row blocks on 132 SMs
    assert isinstance(token_plan(problem(tokens), H200), RowBlock)
    assert isinstance(token_plan(problem(tokens - 128), H200), Split)
    assert isinstance(token_plan(problem(tokens - 128), RTX_4090), RowBlock)
