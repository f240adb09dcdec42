"""The byte model: sums done by hand, and the bounds that every plan keeps."""

import dataclasses
import itertools
import random

import pytest

from adapterkern.backends.traffic import L2_KEEPS, Traffic, total
from adapterkern.bench import roofline
from adapterkern.bench.cases import BenchCase
from benchmarks import model
from benchmarks.__main__ import main

H200 = model.CARDS["h200"]
# The grid of launch configurations that is tuned.
GRID = tuple(
    itertools.product(
        (1, 16, 128, 1024, 4096, 16384, 65536), (768, 1024, 2048, 4096, 8192), (16, 64, 128, 256)
    )
)
BACKENDS = tuple(model.BACKENDS)
# By the width of the bottleneck. Triton's plans were measured: there, more programs with more
# partial sums are faster than fewer bytes.
MOST_TIMES = {
    "cuda": {64: 3.0, 128: 4.5, 256: 9.5},
    "triton": {64: 5.5, 128: 14.0, 256: 9.5},
}


def random_shapes(count: int):
    draw = random.Random(0)
    for _ in range(count):
        tokens = int(2 ** draw.uniform(0, 17))
        yield tokens, 8 * draw.randint(16, 1024), draw.randint(1, 256)


SHAPES = (*GRID, *random_shapes(200))


def predictions(backend: str, mode: str):
    for tokens, hidden, bottleneck in SHAPES:
        case = BenchCase(hidden, bottleneck, tokens, mode=mode)
        form, kernels = model.BACKENDS[backend](case, H200)
        yield model.predict(case, backend, form, kernels, H200)


def test_a_kernel_takes_the_longest_of_its_bounds():
    kernel = Traffic("k", 132, 1, memory=43e6, loads=20e6, stores=20e6, in_flight=1e6)
    # 43 MB at 4.3 TB/s are 10 us; a near-empty kernel takes 2.2 us.
    assert model.seconds([kernel, kernel], H200) * 1e6 == pytest.approx(2 * 12.2)
    few = kernel._replace(in_flight=1e3)
    # Each block loads 20e6 / 132 bytes, 1 KB at a time, each after 0.8 us: all come from memory.
    assert model.bounds(few, H200)["latency"] * 1e6 == pytest.approx(20e6 / 132 / 1e3 * 0.8)
    two = kernel._replace(blocks=133)  # one SM has two blocks, but half as long each would be
    assert model.bounds(two, H200)["latency"] > model.bounds(kernel, H200)["latency"] * 1.9


def least_of_two_passes(case: BenchCase) -> float:
    """The floor, and for the backward what separate weight gradients add to it: x or dy once more,
    dz and a stored and read.
    """
    least = roofline.moved_bytes(case)
    if case.mode == "backward":
        beside = case.hidden_size + 3 * case.bottleneck_size
        least += case.tokens * beside * case.element_size
    return least


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_plans_move_little_more_through_memory_than_they_must(backend, mode):
    """1.15 times the least; a form whose second read of its rows finds them no longer in L2 (row
    blocks of long rows, the split form of many) may read them twice.
    """
    over = {}
    for row in predictions(backend, mode):
        case = row.case
        rows = case.tokens * case.hidden_size * case.element_size
        least = least_of_two_passes(case)
        running = (
            rows
            if row.form == "split"
            else min(rows, H200.num_sms * 2 * 128 * case.hidden_size * 2)
        )
        if row.form != "cluster" and running > L2_KEEPS:
            least += rows
        moved = total(row.kernels, "memory")
        if moved > 1.15 * least:
            over[str(case), row.form] = moved / least
    assert not over


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_split_plans_load_little_more_through_l2_than_they_must(backend, mode):
    """In all kernels of y, or of dz and dx: at most 3 times the bytes of x, y and the weights, or
    no more than L2 serves while as many empty kernels run. Of wide bottlenecks more: there the
    weights, which every block of 64 or 128 tokens reads, are most of what is loaded.
    """
    over = {}
    for row in predictions(backend, mode):
        if row.form != "split":
            continue
        kernels = [kernel for kernel in row.kernels if "_dw_" not in kernel.kernel]
        least = roofline.moved_bytes(dataclasses.replace(row.case, mode="forward"))
        moved = total(kernels, "loads") + total(kernels, "stores")
        most = next(
            times
            for width, times in MOST_TIMES[backend].items()
            if row.case.bottleneck_size <= width
        )
        served = len(kernels) * H200.near_empty * H200.l2_bandwidth
        if moved > max(most * least, served):
            over[str(row.case)] = round(moved / least, 2)
    assert not over


def test_the_command_prints_what_the_model_predicts(capsys):
    sizes = ["--tokens", "2048", "--hidden-size", "4096", "--bottleneck-size", "64"]
    assert main(["model", *sizes, "--kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in model.predictions(H200, [(2048, 4096, 64)]):
        start = f"| {row.case.mode} 2048 x 4096, 64 | {row.backend}, {row.form} "
        (line,) = [line for line in lines if line.startswith(start)]
        assert f"| {row.seconds * 1e6:.1f} | {row.floor * 1e6:.1f} |" in line
        for kernel in row.kernels:
            start = f"| {row.case} {row.backend} | {kernel.kernel} | {kernel.blocks} "
            assert sum(line.startswith(start) for line in lines) == 1


def test_the_command_without_an_extension_tells_why_and_goes_on_with_triton(monkeypatch, capsys):
    def missing(case, card):
        raise RuntimeError("the CUDA extension is not built: no nvcc")

    monkeypatch.setitem(model.BACKENDS, "cuda", missing)
    assert main(["model"]) == 2
    assert "not built: no nvcc\n  hint: --backend triton" in capsys.readouterr().err
    assert main(["model", "--backend", "triton"]) == 0
    assert "cuda" not in capsys.readouterr().out


def test_predictions_keep_what_the_kernels_were_changed_for():
    """The predicted fractions of the floor on an H200 that the changes of docs/performance.md are
    worth; a plan that loses them has to say why."""
    least = {
        ("forward", 16384, 1024): {"cuda": 0.60, "triton": 0.75},
        ("forward", 16384, 4096): {"cuda": 0.60, "triton": 0.60},
        ("backward", 16384, 1024): {"cuda": 0.40, "triton": 0.50},
        ("backward", 16384, 4096): {"cuda": 0.40, "triton": 0.50},
    }
    for row in model.predictions(H200):
        case = row.case
        goals = least.get((case.mode, case.tokens, case.hidden_size))
        if goals and case.bottleneck_size == 64:
            assert row.fraction >= goals[row.backend], (str(case), row.backend)
        if (case.mode, case.tokens, case.hidden_size) == ("forward", 2048, 4096):
            assert row.seconds <= 30e-6
