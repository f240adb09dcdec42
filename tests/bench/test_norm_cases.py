"""Cases with a norm behind the adapter: what is timed, against what, and the bytes it moves."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adapterkern.bench import providers, results, roofline, rotation
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.cases import BenchCase, grid
from adapterkern.bench.measure import Settings, measure_case
from adapterkern.bench.providers import Provider
from adapterkern.bench.timing import WallTimer
from adapterkern.cli.main import main

CASE = BenchCase(48, 8, 33, "fp32", "gelu", "step", "layer")


def rows_of(*chosen, case=CASE):
    chosen = [providers.PROVIDERS.get(entry, entry) for entry in chosen]
    return measure_case(case, chosen, WallTimer(), Calibration(), Settings(seconds=0.0))


def test_a_case_says_its_norm_and_draws_what_it_needs():
    assert str(CASE) == "step-fp32-gelu-T33-H48-R8-layer_norm"
    drawn = CASE.draw("cpu").parameters
    assert list(drawn)[4:] == ["skip", "norm_weight", "norm_bias"]
    assert drawn["skip"].shape == (33, 48)
    assert drawn["norm_weight"].mean() == pytest.approx(1, abs=0.1)
    plain, of_rms = replace(CASE, norm="none").draw("cpu"), replace(CASE, norm="rms").draw("cpu")
    assert len(plain.parameters) == 4
    assert list(of_rms.parameters)[4:] == ["skip", "norm_weight"]
    assert torch.equal(plain.x, of_rms.x)
    assert {case.norm for case in grid([(48, 8)], [3], norm="rms")} == {"rms"}
    with pytest.raises(ValueError, match="unknown norm 'batch'"):
        replace(CASE, norm="batch")


@pytest.mark.sweep
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
def test_providers_that_are_right_are_timed(norm, mode):
    names = ("reference", "separate", "plain", "addmm", "no-adapter", "limit")
    rows = rows_of(*names, case=replace(CASE, norm=norm, mode=mode))
    assert [(row.provider, row.status) for row in rows] == [(name, "ok") for name in names]
    for row in rows[:4]:
        assert 0 < row.error <= row.tolerance < 1e-5
    assert rows[0].repeatable is True
    assert rows[4].note == "the add and the norm of a block without an adapter"


def test_our_pass_saves_the_stream_z_and_two_numbers_a_token():
    ours = rows_of("reference")[0]
    assert ours.saved_bytes == 4 * 33 * (48 + 8 + 2)


@pytest.mark.parametrize("dropped", ["skip", "norm_bias"])
def test_a_provider_without_a_part_of_the_sum_gets_no_time(dropped):
    def build(case, inputs):
        zero = torch.zeros_like(inputs.parameters[dropped])
        lacking = replace(inputs, parameters=inputs.parameters | {dropped: zero})
        return providers.PROVIDERS["plain"].build(case, lacking)

    (row,) = rows_of(Provider("wrong", "for a test", build))
    assert (row.status, row.timings) == ("wrong", {})


def test_a_separate_norm_needs_a_case_with_one():
    (row,) = rows_of("separate", case=replace(CASE, norm="none"))
    assert (row.status, row.note) == ("unavailable", "it is not for a case of one adapter")


def test_the_limit_computes_with_the_skip_that_is_exchanged():
    case = replace(CASE, mode="forward")
    inputs = case.draw("cpu")
    built = providers.PROVIDERS["limit"].build(case, inputs)
    call = built.alone(inputs.x, inputs.dy)
    other = {"skip": torch.ones(33, 48)}
    with rotation.exchanged(built.parameters, other):
        (y,) = call()
    assert torch.equal(y, inputs.x + 1)
    assert torch.equal(call()[0], inputs.x + inputs.parameters["skip"])


def test_sets_count_the_skip():
    case = BenchCase(1024, 64, 16384, norm="layer")
    plain = replace(case, norm="none")
    assert rotation.activation_bytes(case) == 1.5 * rotation.activation_bytes(plain)
    timer = SimpleNamespace(l2_bytes=50 * 2**20)
    assert (rotation.set_count(case, timer), rotation.set_count(plain, timer)) == (2, 3)


# With one unit and many tokens nothing but whole passes over [T, H] is left.
TALL = BenchCase(4096, 1, 1 << 22, norm="layer")


@pytest.mark.parametrize(
    ("implementation", "forward", "recording", "backward"),
    [
        ("floor", 3, 4, 5),
        ("separate", 5, 5, 8),
        ("add-norm", 3, 4, 3),
        ("no-adapter", 5, 5, 5),
        ("limit", 3, 4, 5),
        ("plain", 10, 10, 13),
        ("adapterhub", 12, 12, 15),
    ],
)
def test_passes_over_an_activation(implementation, forward, recording, backward):
    found = [
        roofline.moved_bytes(replace(TALL, mode=mode), implementation) / (4096 * (1 << 22) * 2)
        for mode in ("forward", "step", "backward")
    ]
    wanted = [forward, recording + backward, backward]
    assert found == pytest.approx(wanted, rel=0.002)


def test_the_floor_reads_x_skip_and_both_weights_and_writes_y():
    # 16384 x 1024 x 2 B = 33554432 a pass; each weight is 64 x 1024 x 2 B = 131072.
    case = BenchCase(1024, 64, 16384, norm="rms")
    assert roofline.moved_bytes(case) == 3 * 33554432 + 2 * 131072


def test_bench_times_a_norm_in_the_same_pass(capsys, tmp_path):
    path = tmp_path / "norm.json"
    sizes = ["--hidden-size", "48", "--bottleneck-size", "8", "--tokens", "8", "--mode", "forward"]
    options = ["--norm", "rms", "--seconds", "0.001", "--json", str(path)]
    assert main(["bench", *sizes, *options]) == 0
    assert "bottleneck 8  RMSNorm in the same pass" in capsys.readouterr().out
    rows = results.load(path).rows
    assert [row.provider for row in rows] == ["reference", "plain", "separate", "no-adapter"]
    assert {row.case.norm for row in rows} == {"rms"}
