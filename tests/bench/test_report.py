"""The report from end to end on the CPU, its resumption, its goals, and the README's section."""

import contextlib
import copy
import json
import subprocess
import sys

import pytest
import torch

from adapterkern.bench import results
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.environment import folder_name, git_state
from adapterkern.bench.results import ResultError, Timing
from adapterkern.bench.timing import CudaTimer
from benchmarks import goals, preflight, readme, report, summary, tasks
from benchmarks.__main__ import main

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def without_host(monkeypatch):
    """The host suite has a test of its own, in a process of its own."""
    monkeypatch.setattr(tasks, "_host", lambda result, bench: None)


def options(folder, **more):
    return report.Options(folder, minutes=1, build=False, check=False, tiny=True, **more)


@no_gpu
def test_the_report_runs_from_end_to_end_on_a_cpu(tmp_path, capsys):
    command = ["report", "--out", str(tmp_path / "new"), "--minutes", "1"]
    assert main([*command, "--skip-build", "--skip-check", "--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no GPU here: sizes for a CPU, and nothing about the kernels"
    assert [line.split(":")[1].split(",")[0] for line in lines[2:7]] == [" done"] * 5
    (path,) = (tmp_path / "new").glob("*.json")
    result = results.load(path)
    assert {row.provider for row in result.rows} == {"reference", "plain", "addmm"}
    assert {row.variant for row in result.models} >= {"plain", "lora", "adapterkern"}
    assert {entry["name"] for entry in result.host} == {
        "test_function[inference]",
        "test_function[training]",
    }
    assert all(entry["median_us"] > 0 for entry in result.host)
    header = result.header
    assert header["finished"] is True
    for key in ("created", "commit", "dirty", "versions", "platform", "outcomes", "calibration"):
        assert key in header
    text = path.with_suffix(".md").read_text()
    assert "no GPU here" in text
    assert "| forward-fp32-gelu-T8-H32-R4 | reference |" in text
    assert "over plain" not in text
    names = sorted(entry.name for entry in (tmp_path / "new").glob("*.png"))
    assert names == [f"{path.stem}-{part}.png" for part in ("forward", "models", "step")]


@no_gpu
def test_an_interrupted_report_is_continued_and_loses_nothing(tmp_path, monkeypatch, without_host):
    run_task, ran = report._run_task, []

    def interrupted(task, result, bench, left):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(task.name)
        return run_task(task, result, bench, left)

    monkeypatch.setattr(report, "_run_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.run(options(tmp_path), lambda _text: None)
    (path,) = tmp_path.glob("*.json")
    before = results.load(path)
    assert [entry["task"] for entry in before.log] == ran
    assert before.header["finished"] is False
    assert len(before.rows) == 6

    ran_before, ran[:] = list(ran), []
    monkeypatch.setattr(report, "_run_task", lambda task, *rest: ran.append(task.name) or
                        run_task(task, *rest))  # fmt: skip
    said = []
    assert report.run(options(tmp_path), said.append) == path
    assert not set(ran) & set(ran_before)
    after = results.load(path)
    assert after.rows == before.rows
    assert len(after.log) == 5
    assert after.header["finished"] is True
    assert len(after.header["resumed"]) == 1
    assert "3 tasks done" in said[0]
    # A finished report is left alone: the next one is another file.
    assert report.run(options(tmp_path), said.append) != path
    assert results.load(path) == after


@no_gpu
def test_a_task_that_fails_costs_itself_alone(tmp_path, monkeypatch, without_host):
    def fail(*_arguments, **_options):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(tasks.model_level, "measure_model", fail)
    path = report.run(options(tmp_path), lambda _text: None)
    result = results.load(path)
    assert [entry["status"] for entry in result.log] == ["done"] * 2 + ["failed"] * 2 + ["done"]
    assert len(result.rows) == 6
    assert "no such thing" in path.with_suffix(".md").read_text()


@no_gpu
def test_what_does_not_fit_in_the_time_is_named_and_can_be_run_later(tmp_path, without_host):
    short = report.Options(tmp_path, minutes=1e-4, build=False, check=False, tiny=True)
    path = report.run(short, lambda _text: None)
    result = results.load(path)
    assert {entry["status"] for entry in result.log} == {"out of time"}
    assert result.header["finished"] is False
    assert report.run(options(tmp_path), lambda _text: None) == path
    assert {entry["status"] for entry in results.load(path).log} == {"done"}


def test_an_unwritable_folder_is_refused_before_measuring(tmp_path, capsys):
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    assert main(["report", "--out", str(blocker / "x")]) == 2
    out, err = capsys.readouterr()
    assert "cannot write to" in err
    assert out == ""


def test_the_preflight_builds_checks_and_tests_in_this_order():
    commands = preflight.steps(quick=False, build=True)
    assert list(commands) == ["build", "check", "gpu_tests"]
    words = " ".join(commands["build"])
    assert "pip install --no-build-isolation --no-deps -e" in words
    assert commands["check"][-2:] == ["adapterkern", "check"]
    assert commands["gpu_tests"][2:5] == ["pytest", "-m", "gpu"]
    assert list(preflight.steps(quick=True, build=False)) == ["check", "gpu_tests"]


@pytest.mark.parametrize(
    ("code", "status"),
    [("print('fine')", "passed"), ("raise SystemExit('broken')", "failed")],
)
def test_an_outcome_has_its_last_line(code, status):
    outcome = preflight.run([sys.executable, "-c", code], 60)
    assert outcome["status"] == status
    assert outcome["says"] in ("fine", "broken")


def test_a_step_that_takes_too_long_is_stopped():
    outcome = preflight.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.1)
    assert outcome["status"] == "out of time"
    assert outcome["seconds"] < 20


@no_gpu
def test_failing_checks_are_recorded_and_the_report_goes_on(tmp_path, monkeypatch, without_host):
    broken = {"check": [sys.executable, "-c", "raise SystemExit('one miss')"]}
    monkeypatch.setattr(preflight, "steps", lambda quick, build: broken)
    told = report.Options(tmp_path, minutes=1, tiny=True)
    path = report.run(told, lambda _text: None)
    result = results.load(path)
    assert result.header["outcomes"]["check"]["status"] == "failed"
    assert len(result.rows) == 6
    assert "check: failed" in path.with_suffix(".md").read_text()


def test_every_gpu_task_has_a_name_of_its_own_and_the_first_calibrates():
    work = tasks._gpu_tasks()
    names = [task.name for task in work]
    assert len(names) == len(set(names))
    assert names[0] == "calibration"
    assert names[1] == "adapter forward-bf16-gelu-T16384-H1024-R64"
    # What the first nine minutes hold, by the tasks' own estimates.
    total, within = 0.0, []
    for task in work:
        total += task.seconds
        within += [task.name] if total < 9 * 60 * (1 - report.PREFLIGHT_SHARE) else []
    for wanted in ("step-bf16-gelu-T16384-H8192-R128", "gpt2-medium-1x128-H forward graph"):
        assert any(wanted in name for name in within)


def test_rows_of_the_same_key_are_replaced(gpu_result):
    again = copy.deepcopy(gpu_result.rows[1])
    again.note = "again"
    merged = tasks.replaced(gpu_result.rows, [again])
    assert len(merged) == len(gpu_result.rows)
    assert merged[-1].note == "again"


def test_goals_are_met_or_missed_by_a_number(gpu_result):
    found = {(v.goal, v.promise): v for v in goals.verdicts(gpu_result)}
    forward = found["G1", "forward, of the copy floor, geometric mean >= 90%"]
    assert (forward.met, forward.found) == (False, "80%, 10% short")
    hub = found["G2", "forward against adapterhub >= 3.10x"]
    assert hub.met is True
    assert hub.found == "3.48x"  # 0.8 / 0.23
    assert found["G2", "forward against cublaslt >= 1.35x"].met is None
    assert found["G5", "block forward, two adapters <= 5 %"].met is True
    assert found["G9", "saved beside x <= 1.01 Ur"].met is True
    assert found["G10", "the same bits on every run"].met is True
    assert {v.goal for v in found.values()} == {
        "G1",
        "G2",
        "G3",
        "G4",
        "G5",
        "G7",
        "G9",
        "G10",
        "G11",
    }


def test_a_cpu_result_meets_and_misses_nothing(gpu_result):
    gpu_result.header["device_type"] = "cpu"
    assert {v.met for v in goals.verdicts(gpu_result)} == {None}


def test_the_summary_has_ratios_and_outcomes(gpu_result):
    gpu_result.rows[0].timings["cold"] = Timing(9.0, 10.0, 11.0, 50)
    text = summary.summary(gpu_result)
    assert "- check: passed in 12.0 s (passed: 9 of 9)" in text
    assert (
        "| case | backend | timing | us | of floor | vs plain | vs adapterhub | vs compile |"
        in text
    )
    assert "| forward-bf16-gelu-T4096-H768-R48 | triton | cold | 10.0 | 80% | 2.50x |" in text
    assert "| block-1024 | adapterkern | forward | graph | 0.840 |" in text


def test_the_section_of_a_readme_is_that_of_the_newest_gpu_result(gpu_result, tmp_path):
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    page, folder = tmp_path / "README.md", tmp_path / "benchmarks" / "results"
    page.write_text(text)
    (folder / "cpu").mkdir(parents=True)
    assert readme.write(page, folder) is None
    assert page.read_text() == f"before\n{readme.BEGIN}\n{readme.NO_RESULT}\n{readme.END}\nafter\n"

    on_cpu = copy.deepcopy(gpu_result)
    on_cpu.header |= {"device_type": "cpu", "created": "2027-01-01T00:00:00+00:00"}
    results.save(on_cpu, folder / "cpu" / "newest.json")
    (folder / "made-up-gpu").mkdir()
    older, newer = (folder / "made-up-gpu" / name for name in ("b-older.json", "a-newer.json"))
    results.save(gpu_result, newer)
    gpu_result.header["created"] = "2025-01-01T00:00:00+00:00"
    results.save(gpu_result, older)
    assert readme.write(page, folder) == newer
    text = page.read_text()
    assert "Made-up GPU, torch 2.9.0, triton 3.5.0, commit 012345678, 2026-01-02" in text
    assert "](benchmarks/results/made-up-gpu/a-newer-forward.png)" in text
    assert (folder / "made-up-gpu" / "a-newer-forward.png").exists()
    assert text.startswith("before\n")
    assert text.endswith(f"{readme.END}\nafter\n")


def test_a_readme_without_a_place_for_it_is_refused(tmp_path):
    with pytest.raises(readme.MarkerError, match=r"put these two lines"):
        readme.replaced("# title\n", "text")


def test_the_readme_agrees_with_the_newest_result():
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.replaced(text, readme.section(readme.newest())) == text, (
        "README.md and the newest result disagree; run `python -m benchmarks readme`"
    )


def test_a_broken_file_among_the_results_is_named(tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "broken.json").write_text("{}")
    with pytest.raises(ResultError, match=r"broken\.json"):
        readme.newest(tmp_path)


def test_the_dirty_flag_leaves_out_results(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text(json.dumps({}))
    commit, dirty = git_state(tmp_path)
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "notes.txt").write_text("")
    assert git_state(tmp_path)[1] is False
    (tmp_path / "adapterkern").mkdir()
    (tmp_path / "adapterkern" / "code.py").write_text("")
    assert git_state(tmp_path)[1] is True
    assert git_state(tmp_path / "missing") == (None, None)


def test_a_gpu_names_its_folder():
    assert folder_name("NVIDIA H200") == "nvidia-h200"
    assert folder_name("NVIDIA GeForce RTX 4090 (24 GB)") == "nvidia-geforce-rtx-4090-24-gb"


def gpu_timer():
    timer = object.__new__(CudaTimer)
    timer.device = torch.device("cpu")
    timer.session = contextlib.nullcontext
    return timer


def test_the_calibration_of_a_gpu_goes_into_the_header(gpu_result, monkeypatch):
    measured = Calibration(copy_bandwidth=3e12, l2_bandwidth=5e12)
    monkeypatch.setattr(tasks.calibration, "measure", lambda timer, seconds: measured)
    tasks._calibrate(gpu_result, tasks.Bench(gpu_timer(), ["triton"]))
    assert gpu_result.header["calibration"] == {"copy_bandwidth": 3e12, "l2_bandwidth": 5e12}


def test_a_gpu_report_ends_with_a_second_copy_and_the_clocks(gpu_result, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "timer_for", lambda _device: gpu_timer())
    monkeypatch.setattr(report.calibration, "copy_bandwidth", lambda timer, seconds: 3.5e12)
    monkeypatch.setattr(report.environment, "clocks", lambda _device: {"sm_mhz": 1980.0})
    path = tmp_path / "report.json"
    report._close(gpu_result, path, torch.device("cuda"))
    saved = results.load(path)
    assert saved.header["calibration"]["copy_bandwidth_after"] == 3.5e12
    assert saved.header["clocks_after"] == {"sm_mhz": 1980.0}
    text = path.with_suffix(".md").read_text()
    assert "UNSTEADY" in text
    assert "| G2 | forward against adapterhub >= 3.10x | met | 3.48x |" in text
    assert readme.UNSTEADY in readme.section(path, tmp_path)


def test_adapter_tasks_use_the_backends_and_calibration_of_the_run(gpu_result, monkeypatch):
    seen = []

    def measured(case, providers, timer, calibration, settings):
        seen.append(([entry.name for entry in providers], calibration.copy_bandwidth))
        return []

    monkeypatch.setattr(tasks, "measure_case", measured)
    bench = tasks.Bench(gpu_timer(), ["triton"])
    work = {task.name: task for task in tasks.tasks(bench)}
    work["adapter forward-bf16-gelu-T16384-H1024-R64"].run(gpu_result, bench)
    work["compiled forward-bf16-gelu-T16384-H1024-R64"].run(gpu_result, bench)
    (quick, bandwidth), (full, _) = seen
    assert bandwidth == 4.0e12
    assert quick[0] == "triton"
    assert set(full) - set(quick) == {"compile", "compile-max"}
