"""What a whole GPU report holds, from stand-ins for every measurement: nobody measured this GPU."""

import contextlib

import pytest
import torch

from adapterkern.bench import measure, roofline
from adapterkern.bench.results import ModelRow, Result, Row, Timing, save
from adapterkern.bench.timing import CudaTimer
from benchmarks import goals, models, pictures, readme, report, summary, tasks
from benchmarks.judge import Verdict

CUDA = torch.device("cuda")
CALIBRATION = {
    "copy_bandwidth": 4.0e12,
    "matrix_rate": 700e12,
    "matrix_rate_fp32": 50e12,
    "graph_kernel": 2e-6,
}
# Share of the floor that each provider reaches; ours in the order of "auto", the faster one second.
SHARE = {"triton": 0.8, "cuda": 0.9, "plain": 0.32, "adapterhub": 0.23, "addmm": 0.3}
SHARE |= {"compile": 0.4, "cublaslt": 0.55, "lora": 0.25, "limit": 0.98}


def timing(value):
    return Timing(0.99 * value, value, 1.01 * value, 50)


def stand_in_case(case, providers, timer, calibration, settings):
    """Rows as `measure_case` gives them."""
    machine, rows = calibration.machine(case.dtype), []
    for provider in providers:
        row = Row(case, provider.name, ours=provider.ours, headline=measure.headline(case, CUDA))
        rows.append(row)
        if provider.name in ("no-adapter", "compile-max"):
            continue
        time = roofline.seconds(case, machine) * 1e6 / SHARE[provider.name]
        row.timings = {kind: timing(time) for kind in measure.kinds(case, timer)}
        row.host_us, row.kernels, row.transient_bytes = 9.0, 2, 2**20
        row.error, row.tolerance = 1e-3, 4e-3
        if case.mode != "forward":
            row.saved_bytes = case.tokens * case.bottleneck_size * case.element_size
        row.repeatable = True if provider.ours else None
    measure._derive(rows, case, calibration, CUDA)
    return rows


def stand_in_model(spec, mode, execution, timer, dtype, seconds):
    """Rows as `measure_model` gives them: each further variant takes five per cent more."""
    rows = []
    names = [name for name in models.variants(spec) if mode == "step" or name != "full"]
    for place, name in enumerate(names):
        row = ModelRow(spec.name, name, mode, execution, milliseconds=timing(1 + 0.05 * place))
        row.overhead_percent = 5.0 * place if place else None
        row.trained, row.parameters = (1000 if name == "full" else 10 * place), 1000
        row.peak_bytes = (4 if name == "full" else 1) * 2**30
        rows.append(row)
    return rows


@pytest.fixture
def run(monkeypatch):
    """A report within a time, by the tasks' own estimates; None: all of it."""
    timer = object.__new__(CudaTimer)
    timer.device, timer.session, timer.not_captured = CUDA, contextlib.nullcontext, {}
    monkeypatch.setattr(tasks, "measure_case", stand_in_case)
    monkeypatch.setattr(tasks.model_level, "measure_model", stand_in_model)
    monkeypatch.setattr(tasks.package, "matrix_rate", lambda *_given: 400e12)
    monkeypatch.setattr(tasks, "_calibrate", lambda result, bench: ())
    entry = {"name": "test_module", "median_us": 9.0, "iqr_us": 1.0, "rounds": 20}
    monkeypatch.setattr(tasks, "_host", lambda result, bench: result.host.append(entry) or ())

    def measured(seconds=None):
        bench = tasks.Bench(timer, ["triton", "cuda"])
        header = {
            "created": "2026-01-02T03:04:05+00:00",
            "device": "Made-up GPU",
            "device_type": "cuda",
            "commit": "0123456789abcdef",
            "versions": {"torch": "2.9.0", "triton": "3.5.0"},
            "calibration": dict(CALIBRATION),
            "backends": bench.backends,
            "outcomes": {},
        }
        result = Result(header)
        for task in tasks.tasks(bench):
            if seconds is not None:
                if task.seconds > seconds:
                    continue
                seconds -= task.seconds
            task.run(result, bench)
        return result

    return measured


def test_every_gpu_task_has_a_name_of_its_own_and_the_first_calibrates():
    names = [task.name for task in tasks._gpu_tasks()]
    assert len(names) == len(set(names))
    assert names[:2] == ["calibration", "adapter forward-bf16-gelu-T16384-H1024-R64"]
    assert sum(name.startswith("compiled") for name in names) == 1  # minutes of autotuning each


def test_nine_minutes_hold_every_goal(run):
    whole = 9 * 60 * (1 - report.PREFLIGHT_SHARE) - report.CLOSING_SECONDS
    result = run(whole)
    unmeasured = [f"{v.goal} {v.promise}" for v in goals.verdicts(result) if v.met is None]
    assert unmeasured == ["G10 at most 5 % slower than atomics"]
    assert result.host
    assert {row.case.dtype for row in result.rows} == {"bf16", "fp16", "fp32"}
    forwards = {row.model for row in result.models if row.mode == "forward"}
    assert forwards >= {"bert-base-32x128", "llama-7b-block-4x2048", *models.PUBLISHED}
    patched = {(row.model, row.mode) for row in result.models if row.variant.endswith("-patched")}
    assert patched >= {
        ("bert-base-32x128-seq_bn", "forward"),
        ("gpt2-medium-16x256-seq_bn", "decode"),
    }


def test_what_auto_runs_is_judged_though_another_backend_is_faster(run):
    found = {(v.goal, v.promise): v for v in goals.verdicts(run())}
    forward = found["G1", "forward, of the copy floor, worst >= 85%"]
    assert (forward.met, forward.found) == (False, "80%, 5% short")
    assert forward.others == ("cuda 90%",)
    assert "on triton: memory-bound, 2 kernels (floor 1), " in forward.why
    assert " MB at least in " in forward.why
    hub = found["G2", "forward against adapterhub >= 3.10x"]
    assert (hub.met, hub.found) == (True, "3.48x")  # 0.8 / 0.23
    assert found["G5", "block forward, two adapters <= 5 %"].found == "15.00 %, 10.00 over"
    assert found["G9", "saved beside x <= 1.01 Ur"].met is True
    assert found["G10", "the same bits on every run"].met is True
    single = found["G11", "float32 with TF32, of its floor >= 85%"]
    assert "T16384-H1024-R64 on triton: memory-bound" in single.why  # at the rate of TF32
    full = found["G11", "float32 in full precision, error of its tolerance <= 1"]
    assert (full.found, full.met) == ("0.25", True)
    assert "T16384-H3072-R64 on triton" in full.why
    assert {goal for goal, _ in found} == {
        *("G1", "G2", "G3", "G4", "G5", "G7", "G9", "G10", "G11", "Triton", "CUDA", "auto"),
    }


def test_each_family_of_kernels_is_held_to_its_own_goals(run):
    found = {(v.goal, v.promise): v for v in goals.verdicts(run())}
    worst = "forward, T >= 16384, R <= 64, of the copy floor"
    triton = found["Triton", f"{worst} >= 75%"]
    assert (triton.met, triton.found) == (True, "80%")
    cuda = found["CUDA", f"{worst} >= 88%"]
    assert (cuda.met, cuda.found) == (True, "90%")
    assert all("on cuda" in v.why for (goal, _), v in found.items() if goal == "CUDA")


def slower(timing):
    return Timing(10 * timing.p20, 10 * timing.p50, 10 * timing.p80, timing.samples)


def test_auto_is_held_against_the_faster_backend(run):
    promise = "against the best of all backends and plain layers, on any shape >= 0.97x"
    verdict = next(v for v in goals.verdicts(run()) if v.promise == promise)
    assert verdict.met is False
    result = run()
    for row in result.rows:
        if row.provider == "cuda":
            row.timings = {kind: slower(timing) for kind, timing in row.timings.items()}
    verdict = next(v for v in goals.verdicts(result) if v.promise == promise)
    assert (verdict.met, verdict.found) == (True, "1.00x")


def worst_forward(result):
    promise = "forward, of the copy floor, worst >= 85%"
    return next(v for v in goals.verdicts(result) if v.promise == promise)


def test_a_backend_that_cannot_run_a_case_leaves_it_to_the_next(run):
    result = run()
    for row in result.rows:
        if row.provider == "triton":
            row.status, row.timings, row.floor_fraction = "unavailable", {}, None
    verdict = worst_forward(result)
    assert (verdict.found, verdict.met) == ("90%", True)
    assert "on cuda" in verdict.why


def test_a_wrong_result_of_the_chosen_backend_is_a_miss(run):
    result = run()
    for row in result.rows:
        row.floor_fraction = 0.95 if row.floor_fraction else None
    assert worst_forward(result).met is True
    wrong = next(
        row for row in result.rows
        if (row.provider, str(row.case)) == ("triton", "forward-bf16-gelu-T16384-H4096-R64")
    )  # fmt: skip
    wrong.status, wrong.timings = "wrong", {}
    verdict = worst_forward(result)
    assert (verdict.found, verdict.met) == ("95%", False)
    assert "without a time: forward-bf16-gelu-T16384-H4096-R64 on triton, wrong" in verdict.why


def test_what_was_not_measured_says_why(run):
    result = run()
    result.rows = [row for row in result.rows if row.case.tokens != 16]
    for row in result.rows:
        row.ratios.pop("cublaslt", None)
    found = {v.promise: v for v in goals.verdicts(result)}
    decode = found["decode, in a graph <= 3.3 us"]
    assert decode.met is not None  # T = 1 is left
    ratio = found["forward against cublaslt >= 1.35x"]
    assert (ratio.state, ratio.why) == ("not measured", "the file lacks the baseline or the count")
    result.rows = []
    assert worst_forward(result) == Verdict(
        "G1", "forward, of the copy floor, worst >= 85%", why="no such case was run"
    )


def test_the_readme_of_a_whole_report_is_short(run, tmp_path):
    path = tmp_path / "report.json"
    save(run(), path)
    lines = readme.section(path, tmp_path).splitlines()
    head = next(line for line in lines if line.startswith("| case |"))
    assert head.count(" vs ") == len(readme.BASELINES) == 5
    rows = [line for line in lines if line.startswith(("| forward-", "| step-", "| backward-"))]
    assert 8 <= len(rows) <= 20
    assert {line.split("-T")[1].split("-")[0] for line in rows} == {"16", "2048", "16384"}
    assert all("| triton |" in line for line in rows)
    assert "[all rows](report.md)" in "\n".join(lines)


def test_the_summary_of_a_whole_report_compares_with_full_training_and_the_stock_model(run):
    text = summary.summary(run())
    row = "| bert-base-32x128 | adapterkern | eager | 3.00% | 0.5-5 % | 0.96 | 0.25 |"
    assert row in text  # 30 of 1000 parameters, 1.15 of 1.2 ms, 1 of 4 GiB
    row = "| gpt2-medium-1x128-H | adapterkern | forward | graph | 1.150 | 1024 | 3.00% | +15.0 % |"
    assert f"{row} +30.3 % |" in text
    assert "| forward-fp32-gelu-T16384-H1024-R64 TF32 | triton | cold |" in text
    assert "| forward-fp32-gelu-T16384-H3072-R64 | triton | cold |" in text
    assert "| step | graph | 1.150 | 1024 | 3.00% | +15.0 % | - |" in text  # published: forwards
    row = "| gpt2-medium-16x256-par_bn | decode | eager | 1.000 | 1.050 | 1.100 | 1.150 |"
    assert f"{row} 0.95x | 0.91x |" in text
    assert "| bert-base-32x128-seq_bn | adapterhub-patched |" not in text  # in its own table


def test_pictures_of_a_whole_report_have_lines_and_one_family_each(run, tmp_path):
    result = run()
    written, problems = pictures.draw(result, tmp_path / "r.json")
    assert problems == []
    families = [f"models-{name}" for name in ("block", "gpt2", "bert", "llama", "adapterhub")]
    assert {path.stem for path in written} == {
        f"r-{part}" for part in ("forward", "step", "backward", *families)
    }
    for rows in pictures._panels(result).values():
        counts = {}
        for row in rows:
            counts.setdefault((row.case.shape, row.case.dtype), set()).add(row.case.tokens)
        assert min(map(len, counts.values())) >= 2
