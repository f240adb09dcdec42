"""The bytes and predictions of many adapters in one batch: sums done by hand, and plans as they are
launched.
"""

import functools

import pytest

from adapterkern.backends.cuda import grouped as cuda_grouped
from adapterkern.backends.cuda import grouped_traffic as cuda_traffic
from adapterkern.backends.cuda import launch_config as cuda
from adapterkern.backends.traffic import Batch, total
from adapterkern.backends.triton import grouped_traffic as traffic
from adapterkern.backends.triton.grouped_gradient_launches import Chunks
from adapterkern.backends.triton.grouped_launches import forward_plan
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
)
from adapterkern.bench import roofline
from adapterkern.bench.cases import BenchCase
from benchmarks import many_model, model
from benchmarks.__main__ import main

DEVICE = Device(132, 227 * 1024)
H200 = model.CARDS["h200"]
TILE = RowBlock(LaunchConfig(64, 64, 64, 4, 5, 2, most_out_stages=5))


def problem_of(batch, hidden=1024, units=64):
    return Problem(batch.taken + batch.rest, hidden, units, False, False)


def test_a_tile_reads_its_adapter_and_the_rows_of_its_tokens_once():
    batch = Batch((128, 0, 65, 1), rest=6)
    (kernel,) = traffic.forward(problem_of(batch), TILE, DEVICE, batch)
    # 200 tokens of 2 KiB; three adapters of 2 x 64 x 1024 x 2 B = 262144; blocks: 2 + 2 + 1, and 1
    # of the tokens without an adapter, which read x once; 4 B a token and 12 a tile; z is stored.
    rows, taken, weights = 200 * 2048, 194 * 2048, 262144
    routing, z = 4 * 200 + 12 * 6, 200 * 128
    assert (batch.used, kernel.blocks) == (3, 6)
    assert kernel.memory == 2 * rows + 3 * weights + routing + z
    assert kernel.loads == rows + taken + 5 * weights + routing
    assert kernel.stores == rows + z
    assert kernel.flops == 5 * 64 * 4 * 1024 * 64  # of full tiles, whoever is in them
    (unsaved,) = traffic.forward(problem_of(batch), TILE, DEVICE, batch, save=False)
    assert kernel.memory - unsaved.memory == kernel.stores - unsaved.stores == z


def test_tokens_without_an_adapter_are_a_copy():
    batch = Batch((0,) * 16, rest=2048)
    (kernel,) = traffic.forward(problem_of(batch), TILE, DEVICE, batch, save=False)
    rows, routing = 2048 * 2048, 4 * 2048 + 12 * 32
    assert (kernel.memory, kernel.loads, kernel.stores) == (
        2 * rows + routing,
        rows + routing,
        rows,
    )
    assert (kernel.blocks, kernel.flops) == (32, 0)


def test_more_units_than_a_tile_read_x_for_each_and_a_with_every_tile_of_features():
    batch = Batch((64, 64))
    config = LaunchConfig(64, 64, 128, 4, 4)
    (kernel,) = traffic.forward(
        problem_of(batch, 1024, 256), RowBlock(config), DEVICE, batch, save=False
    )
    rows, weights, units, routing = 128 * 2048, 2 * 256 * 1024 * 2, 128 * 512, 4 * 128 + 2 * 12
    assert kernel.loads == rows + 2 * rows + 2 * weights + routing + 16 * units
    assert kernel.stores == rows + units
    assert kernel.memory == 2 * rows + 2 * weights + routing  # L2 has the rest


def test_by_row_every_token_loads_an_adapter_that_comes_from_memory_once():
    batch = Batch((3, 0, 1), rest=2)
    plan = Split(LaunchConfig(1, 64, 64, 4, 1), LaunchConfig(1, 128, 64, 4, 1), 4, 256, 128)
    first, second = traffic.forward(problem_of(batch), plan, DEVICE, batch)
    weight, row = 64 * 1024 * 2, 1024 * 2
    sums = 4 * 4 * 64 * 4  # slices, tokens, units, bytes
    assert (first.blocks, second.blocks) == (4 * 4, 6 * 8)
    assert first.memory == 4 * row + 2 * weight + 6 * 4
    assert first.loads == 4 * row + 4 * weight + 6 * 4
    assert first.stores == sums
    assert second.memory == 6 * row + 2 * weight + 6 * 128
    assert second.loads == 6 * row + 4 * weight + 8 * sums + 6 * 4
    assert second.stores == 6 * row + 6 * 128


def test_segments_are_what_chunks_cut_of_the_rows_of_a_slot():
    # In tiles of 64: 1, 3, none, 2. Chunks of 2 tiles begin at 0, 2 and 4.
    assert Batch((64, 130, 0, 128)).segments(128) == [1, 2, 0, 1]
    assert Batch((64, 193, 0, 128)).segments(128) == [1, 3, 0, 2]
    assert Batch((512,)).segments(128) == [4]


def test_weight_gradients_store_a_lone_segment_at_once_and_zeros_for_the_others():
    batch, config = Batch((64, 130, 0, 128)), LaunchConfig(64, 64, 64, 8, 4)
    products, total_of = traffic.weight_gradients(
        problem_of(batch), config, Chunks(128, 9), DEVICE, batch
    )
    rows, units, weights = 2 * 322 * 2048, 2 * 322 * 128, 2 * 64 * 1024
    assert products.blocks == 16 * 4
    assert products.memory == rows + units + 2 * weights * 2
    assert products.loads == rows + 16 * units + 16 * 322 * 4
    assert products.stores == 2 * weights * 2 + 2 * weights * 4
    assert total_of.loads == 2 * weights * 4 + 8 * 4  # two partial sums, and where slots begin
    assert total_of.stores == total_of.memory == 2 * weights * 2  # their sum, and zeros


def test_the_input_gradient_reads_z_and_keeps_two_tensors_like_it():
    batch = Batch((128, 64))
    kernel, *none = traffic.input_gradient(problem_of(batch), TILE.kernel, DEVICE, batch)
    assert none == []
    rows, weights, units, routing = 192 * 2048, 262144, 192 * 128, 4 * 192 + 3 * 12
    assert kernel.memory == 2 * rows + 2 * weights + 3 * units + routing
    assert (kernel.stores, kernel.loads) == (
        rows + 2 * units, 2 * rows + 3 * weights + units + routing,
    )  # fmt: skip
    wide = problem_of(batch, 1024, 256)
    plan = Split(LaunchConfig(64, 64, 128, 4, 4), LaunchConfig(64, 64, 128, 4, 3), 1, 1024, 512)
    first, second = traffic.input_gradient(wide, plan, DEVICE, batch)
    weight, units = 256 * 1024 * 2, 192 * 512
    assert (first.blocks, second.blocks) == (3 * 2, 3 * 2)
    assert first.loads == 2 * rows + 3 * weight + units
    assert second.loads == rows + 3 * weight + 16 * units
    assert total((first, second), "memory") == 2 * rows + 4 * weight + 3 * units


@pytest.mark.parametrize(("tokens", "by_row"), [(1, True), (16, True), (64, True), (65, False)])
def test_the_model_follows_the_plan_of_the_kernels(tokens, by_row):
    plan = forward_plan(Problem(tokens, 4096, 64, False, False), DEVICE)
    assert isinstance(plan, Split) is by_row
    form, kernels = many_model.triton_calls(BenchCase(4096, 64, tokens, adapters=tokens), H200)
    assert (form, len(kernels)) == (("by row", 2) if by_row else ("tiled", 1))


def test_every_case_moves_little_more_than_its_floor():
    for row in found().values():
        predicted = row.prediction
        assert 1 <= predicted.hbm < 1.3, str(predicted.case)
        assert predicted.floor < predicted.seconds


@functools.cache
def found():
    """Not before a test runs: what the CUDA kernels are is known then without the extension."""
    return {
        (row.prediction.backend, str(row.prediction.case)): row
        for row in many_model.predictions(H200)
    }


def of(mode, hidden, tokens, adapters, backend="triton", mix=""):
    return found()[backend, f"{mode}-bf16-gelu-T{tokens}-H{hidden}-R64-A{adapters}{mix}"]


@pytest.mark.parametrize("backend", many_model.BACKENDS)
def test_decoding_takes_the_bandwidth_of_the_weights(backend):
    """64 adapters of 1 MiB each and 64 rows of 8 KiB in and out, at 4.3 TB/s, and two launches."""
    row = of("forward", 4096, 64, 64, backend)
    moved = 64 * 2**20 + 2 * 64 * 8192
    assert roofline.moved_bytes(row.prediction.case) == moved
    slots = 64 * 4  # x comes from L2 when it is added
    assert row.prediction.seconds == pytest.approx((moved + slots) / 4.3e12 + 2 * 2.2e-6, rel=0.01)
    assert row.prediction.fraction > 0.75


def test_sixteen_adapters_cost_little_more_than_one_where_their_weights_are_few():
    """With 128 rows each, the weights of 16 adapters are half of all bytes: 1.10 times one adapter
    is out of reach where memory bounds, and is kept where it does not, or with 1024 rows.
    """
    for tokens in (2048, 16384):
        row = of("forward", 1024, tokens, 16)
        assert row.prediction.seconds < 1.10 * row.single
    case = of("forward", 4096, 2048, 16).prediction.case
    ratio = roofline.moved_bytes(case) / roofline.moved_bytes(case, "single")
    assert ratio == pytest.approx((256 + 128) / (256 + 8))
    for row in found().values():
        assert row.loop is None or row.prediction.seconds < row.loop


def test_no_token_with_an_adapter_is_as_fast_as_a_copy():
    row = of("forward", 1024, 2048, 16, mix="_none")
    assert row.loop is None
    assert row.prediction.seconds / row.copy == pytest.approx(1, abs=0.02)


def test_the_command_prints_a_row_for_every_case(capsys):
    assert main(["model"]) == 0
    assert many_model.table(list(found().values())) in capsys.readouterr().out
    assert main(["model", "--backend", "triton"]) == 0
    out = capsys.readouterr().out
    assert "| forward 64 x 128 tokens, Zipf, H 1024 | triton, tiled | " in out
    assert "| forward 16 x 128 tokens, none taken, H 1024 | triton, tiled | " in out
    assert "cuda, by row" not in out


def test_the_cuda_kernels_move_what_the_tokens_of_each_tile_need():
    batch, problem = Batch((128, 0, 65, 1), rest=6), cuda.Problem(200, 1024, 64, True)
    device = cuda.Device(132, 227 * 1024, 227 * 1024)
    plan = cuda_grouped.grouped_plan(problem, 4, device)
    (kernel,) = cuda_traffic.forward(problem, plan, device, batch)
    rows, taken, weights = 200 * 2048, 194 * 2048, 262144
    routing, z = 4 * 200 + 12 * 6, 200 * 128
    assert (kernel.blocks, kernel.memory) == (6, 2 * rows + 3 * weights + routing + z)
    assert kernel.loads == rows + taken + 5 * weights + routing
    assert kernel.stores == rows + z
    few = Batch((3, 0, 1), rest=2)
    plan = cuda_grouped.GroupedPlan(slices=cuda.Slices(4, 256))
    first, second = cuda_traffic.forward(problem._replace(num_tokens=6), plan, device, few)
    weight, row, sums = 64 * 1024 * 2, 2048, 4 * 4 * 64 * 4
    assert (first.blocks, second.blocks) == (4 * 4, 6 * 4)
    assert (first.memory, first.stores) == (4 * row + 2 * weight + 24, sums)
    assert second.loads == 6 * row + 4 * weight + 4 * sums + 24
    assert second.memory == 6 * row + 2 * weight + 6 * 128
