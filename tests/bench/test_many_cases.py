"""Cases of many adapters in one batch: what is timed, against what, and the bytes it moves."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adapterkern.bench import many, providers, results, roofline, rotation
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.cases import BenchCase, grid_of_many, parameter
from adapterkern.bench.gate import Gate
from adapterkern.bench.measure import Settings, measure_case, outputs_of
from adapterkern.bench.providers import PROVIDERS, Provider
from adapterkern.bench.results import Result, from_json, to_json
from adapterkern.bench.roofline import Kernel, Machine
from adapterkern.bench.table import render
from adapterkern.bench.timing import WallTimer
from adapterkern.cli.main import main

CASE = BenchCase(48, 8, 64, "fp32", "gelu", "step", adapters=4)
OF_MANY = ("single", "loop", "lora-mixed", "routing", "limit")


def rows_of(*chosen, case=CASE):
    chosen = [PROVIDERS.get(entry, entry) for entry in chosen]
    return measure_case(case, chosen, WallTimer(), Calibration(), Settings(seconds=0.0))


def test_a_case_says_its_adapters_and_draws_a_stack_of_them():
    assert str(CASE) == "step-fp32-gelu-T64-H48-R8-A4"
    assert str(replace(CASE, mix="zipf")) == "step-fp32-gelu-T64-H48-R8-A4_zipf"
    assert (CASE.kind, CASE.rows, replace(CASE, mix="zipf").rows) == ("many", 16, 4)
    drawn = {name: tuple(t.shape) for name, t in CASE.draw("cpu").parameters.items()}
    assert drawn == {
        "down_weights": (4, 8, 48), "up_weights": (4, 48, 8),
        "down_biases": (4, 8), "up_biases": (4, 48),
    }  # fmt: skip
    row = results.Row(CASE, "reference")
    assert from_json(to_json(Result({}, [row]))).rows == [row]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"mix": "odd"}, "unknown mix 'odd'"),
        ({"adapters": -1}, "at least 1 and without a norm, got -1"),
        ({"norm": "layer"}, "without a norm, got 4 and norm 'layer'"),
        ({"tokens": 63}, "63 tokens do not make 4 sequences"),
        ({"tokens": 60, "mix": "zipf"}, "60 tokens do not make 16 sequences"),
    ],
)
def test_what_cannot_be_a_case_is_refused(changes, wanted):
    with pytest.raises(ValueError, match=wanted):
        replace(CASE, **changes)


def test_the_mixes_give_every_adapter_its_tokens():
    even = replace(CASE, tokens=16 * 32, adapters=16)
    assert Counter(even.ids("cpu").tolist()) == dict.fromkeys(range(16), 32)
    # 64 sequences of 8 tokens: one an adapter, the other 48 by 1, 1/2, 1/3, ... over their sum.
    counts = Counter(replace(even, mix="zipf").ids("cpu").tolist())
    share = 48 / sum(1 / place for place in range(1, 17))
    wanted = {i: 8 * (1 + int(share / (i + 1))) for i in range(1, 16)}
    assert counts == {0: 512 - sum(wanted.values()), **wanted}
    assert counts[0] > 2 * counts[1] > 4 * counts[7] > 0
    assert set(replace(even, mix="none").ids("cpu").tolist()) == {-1}
    order = even.adapter_of_sequences()
    assert order != sorted(order)
    assert order == even.adapter_of_sequences()


def test_a_grid_leaves_out_the_mixes_that_cannot_be():
    found = grid_of_many([(48, 8)], [4, 1], [32, 1], ["even", "zipf"], ["forward"], ["fp32"])
    assert [str(case).partition("gelu-")[2] for case in found] == [
        *("T1-H48-R8-A1", "T32-H48-R8-A1", "T4-H48-R8-A4", "T128-H48-R8-A4"),
        "T128-H48-R8-A4_zipf",
    ]


@pytest.mark.sweep
@pytest.mark.parametrize("mix", ["even", "zipf"])
@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
def test_providers_that_are_right_are_timed(mode, mix):
    pytest.importorskip("peft")
    rows = rows_of("reference", *OF_MANY, case=replace(CASE, mode=mode, mix=mix))
    found = {row.provider: (row.status, row.note) for row in rows}
    if mode != "forward":
        refusal = "unavailable", "PEFT refuses adapter_names in training"
        assert found.pop("lora-mixed") == refusal
    assert {status for status, _ in found.values()} == {"ok"}
    checked = [row for row in rows if row.error is not None]
    assert {row.provider for row in checked} == found.keys() - {"routing", "limit"}
    for row in checked:
        assert 0 < row.error <= row.tolerance < 1e-5
    assert rows[0].repeatable is True


def test_without_an_adapter_y_is_x_and_there_is_nothing_to_loop_over():
    rows = rows_of("reference", "loop", "limit", case=replace(CASE, mode="forward", mix="none"))
    assert [row.status for row in rows] == ["ok", "unavailable", "ok"]
    assert rows[0].error == 0


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["plain", "lora", "separate", "no-adapter"])
def test_what_runs_one_adapter_gets_no_row_of_many(name):
    (row,) = rows_of(name)
    assert (row.status, row.note) == ("unavailable", "it is not for many adapters in a batch")


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["single", "loop", "routing"])
def test_what_runs_many_gets_no_row_of_one(name):
    (row,) = rows_of(name, case=replace(CASE, adapters=0))
    assert (row.status, row.note) == ("unavailable", "it is not for a case of one adapter")


@pytest.mark.sweep
@pytest.mark.parametrize("fault", ["slot", "tokens"])
def test_a_provider_that_mixes_adapters_up_gets_no_time(fault):
    def build(case, inputs):
        built = PROVIDERS["reference"].build(case, inputs)
        if fault == "slot":  # two adapters take each other's weights
            swapped = {n: t[[1, 0, 2, 3]] for n, t in inputs.parameters.items()}
            return PROVIDERS["reference"].build(case, replace(inputs, parameters=swapped))
        return replace(built, forward=lambda x: built.forward(x.roll(1, 0)).roll(-1, 0))

    for mode in ("forward", "step"):
        (row,) = rows_of(
            Provider("wrong", "t", build, kinds=("many",)), case=replace(CASE, mode=mode)
        )
        assert (row.status, row.timings) == ("wrong", {})


def test_the_gate_knows_a_gradient_of_another_adapter():
    inputs = CASE.draw("cpu")
    built = many.loop(CASE, inputs)
    outputs = outputs_of(built, CASE, inputs)
    names = inputs.named(built.parameters)
    assert len(names) == 16
    gate = Gate(CASE, inputs)
    assert gate.judge(outputs, "gelu", names).passed
    outputs["d_up_weights.2"] = outputs["d_up_weights.3"]
    verdict = gate.judge(outputs, "gelu", names)
    assert (verdict.passed, verdict.tensor) == (False, "d_up_weights.2")


def test_leaves_of_one_adapter_take_their_part_of_other_stacks():
    inputs, other = CASE.draw("cpu"), CASE.draw("cpu", seed=1)
    assert parameter(inputs.parameters, "norm_weight") is None
    stack = inputs.parameters["down_weights"]
    assert parameter(inputs.parameters, "down_weights") is stack
    assert torch.equal(parameter(inputs.parameters, "down_weights.3"), stack[3])
    for name in ("loop", "single", "reference"):
        built = PROVIDERS[name].build(CASE, inputs)
        there = PROVIDERS[name].build(CASE, other)
        with torch.no_grad(), rotation.exchanged(built.parameters, other.parameters):
            assert torch.equal(built.forward(inputs.x), there.forward(inputs.x))
        with torch.no_grad():
            assert not torch.equal(built.forward(inputs.x), there.forward(inputs.x))


def test_sets_hold_the_weights_of_every_adapter_that_is_used():
    case = BenchCase(4096, 64, 64, adapters=64)
    one = (2 * 4096 * 64 + 4096 + 64) * 2
    assert rotation.weight_bytes(case) == 64 * one
    assert rotation.weight_bytes(replace(case, adapters=0)) == one
    assert rotation.weight_bytes(replace(case, mix="none")) == 0
    timer = SimpleNamespace(l2_bytes=50 * 2**20)
    assert rotation.set_count(case, timer) == 3  # 68.7 MB each
    few = replace(CASE, tokens=4, mix="none")
    inputs = few.draw("cpu")
    first, second = rotation.sets(few, inputs, SimpleNamespace(l2_bytes=1000))[:2]
    assert second.parameters is first.parameters  # which no call reads
    assert second.x is not first.x


def test_the_floor_reads_x_and_the_weights_of_all_adapters_and_writes_y():
    # x and y are 64 x 4096 x 2 B = 524288 each, and each weight 64 x 4096 x 2 B as well.
    case = BenchCase(4096, 64, 64, adapters=64)
    assert roofline.moved_bytes(case) == 2 * 524288 + 64 * 2 * 524288
    assert roofline.moved_bytes(case, "single") == 2 * 524288 + 2 * 524288
    assert roofline.moved_bytes(case, "limit") == 2 * 524288
    none = replace(case, mix="none")
    assert roofline.moved_bytes(none) == 2 * 524288
    assert sum(kernel.flops(none) for kernel in roofline.kernels(none)) == 0
    # The step: z twice; forward 2, backward 3 activations; 2 + 4 weights an adapter.
    step = replace(case, mode="step")
    z = 64 * 64 * 2
    assert roofline.moved_bytes(step) == 5 * 524288 + 2 * z + 64 * 6 * 524288
    assert roofline.moved_bytes(step, "single") == 5 * 524288 + 2 * z + 6 * 524288
    assert roofline.bound(case, Machine(4e12)) == "weights"
    assert roofline.bound(replace(case, tokens=64 * 128), Machine(4e12)) == "memory"


def test_a_loop_launches_for_every_adapter_and_moves_x_and_y_thrice():
    case = BenchCase(4096, 64, 2048, adapters=16)
    kernels = roofline.kernels(case, "loop")
    assert len(kernels) == 16 + 3
    assert kernels[1] == Kernel(2 / 16, 0, 2 / 16, 2 / 16)
    row, weight = 2048 * 4096 * 2, 4096 * 64 * 2
    assert roofline.moved_bytes(case, "loop") == 8 * row + 16 * 2 * weight
    slow = Machine(4e12, None, 3e-6)  # each launch takes longer than its bytes, but the three moves
    wanted = 3 * max(3e-6, 2 * row / 4e12) + 16 * 3e-6
    assert roofline.seconds(case, slow, "loop") == pytest.approx(wanted)


def test_a_table_says_how_tokens_choose_and_gives_no_ratio_of_the_routing(gpu_result):
    def row(name, time, case):
        timings = {"graph": results.Timing(time, time, time, 9)}
        return results.Row(case, name, ours=name == "triton", headline="graph", timings=timings)

    from adapterkern.bench.measure import _derive

    case = BenchCase(1024, 64, 512, adapters=16)
    cases = [case, replace(case, mix="zipf"), replace(case, mix="none")]
    gpu_result.rows = []
    for one in cases:
        times = {"triton": 10.0, "single": 9.0, "routing": 5.0, "limit": 4.0}
        rows = [row(name, time, one) for name, time in times.items()]
        _derive(rows, one, Calibration(copy_bandwidth=4e12), torch.device("cuda"))
        gpu_result.rows += rows
    assert gpu_result.rows[0].ratios == {"single": 0.9, "limit": 0.4}
    text = render(gpu_result)
    for title in (
        "adapters 16 of 32 tokens each",
        "adapters 16 by Zipf's law, sequences of 8 tokens",
        "adapters 16, which no token takes",
    ):
        assert f"bottleneck 64  {title}" in text
    line = next(line for line in text.splitlines() if line.startswith("  single"))
    moved = roofline.moved_bytes(case, "single") / 9e-6 / 1e9
    assert line.split()[2:4] == ["0.90x", f"{moved:.0f}"]
    line = next(line for line in text.splitlines() if line.startswith("  routing"))
    assert line.split()[2] == "-"


SIZES = ["--hidden-size", "48", "--bottleneck-size", "8", "--seconds", "0.001"]


@pytest.mark.thorough
def test_bench_times_many_adapters_and_compares_with_a_file(capsys, tmp_path):
    path = tmp_path / "many.json"
    options = ["--adapters", "2", "--rows", "4", "--mode", "forward"]
    assert main(["bench", *SIZES, *options, "--json", str(path)]) == 0
    rows = results.load(path).rows
    assert [row.provider for row in rows] == ["reference", *OF_MANY] * 2
    assert {(row.case.adapters, row.case.tokens, row.case.mix) for row in rows} == {
        (2, 8, "even"), (2, 8, "zipf"),
    }  # fmt: skip
    capsys.readouterr()
    options += ["--mix", "zipf", "--backend", "reference", "--baseline", "loop"]
    assert main(["bench", *SIZES, *options, "--compare", str(path)]) == 0
    out = capsys.readouterr().out
    assert "forward-fp32-gelu-T8-H48-R8-A2_zipf (eager)" in out
    assert "\n  loop  " in out.split("verdict")[1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--rows", "4"], "--rows and --mix are of many adapters"),
        (["--adapters", "4", "--tokens", "8"], "goes with neither --tokens nor --norm"),
        (["--adapters", "4", "--norm", "rms"], "goes with neither --tokens nor --norm"),
        (["--adapters", "4", "--mix", "zipf", "--rows", "3"], "two adapters and a multiple of 4"),
        (["--adapters", "4", "--mix", "odd"], "unknown mix 'odd'"),
        (["--adapters", "0"], "must be at least 1"),
    ],
)
def test_wrong_usage_of_many_adapters_is_refused(options, wanted, capsys):
    assert main(["bench", *SIZES, *options]) == 2
    assert wanted in capsys.readouterr().err


def test_many_adapters_are_four_numbers_of_them_by_three_of_rows():
    from argparse import Namespace

    from adapterkern.cli.bench_choices import cases

    names = ("tokens", "preset", "dtype", "activation", "mode", "norm", "rows", "mix")
    asked = Namespace(
        **dict.fromkeys(names), hidden_size=None, bottleneck_size=None, adapters=[], quick=False
    )
    found = cases(asked, "cuda")
    assert {(case.adapters, case.tokens // case.adapters) for case in found} == {
        (number, rows) for number in (1, 4, 16, 64) for rows in (1, 32, 128)
    }
    assert {case.hidden_size for case in found} == {1024, 4096}
    assert len(found) == 2 * 2 * (12 + 6)
    few = cases(asked, "cpu")  # in about a minute
    assert max(case.tokens for case in few) == 512
    assert [len(few), {case.hidden_size for case in few}] == [2 * (6 + 2), {768}]
    asked.quick = True
    assert [(c.adapters, c.tokens, c.mix) for c in cases(asked, "cpu")][:2] == [
        (16, 512, "even"), (16, 512, "zipf"),
    ]  # fmt: skip


def test_every_name_of_the_table_of_providers_has_its_kind():
    of_many = [name for name, entry in PROVIDERS.items() if "many" in entry.kinds]
    assert of_many == [*(entry.name for entry in providers.BACKENDS), *OF_MANY]
