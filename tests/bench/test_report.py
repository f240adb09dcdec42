"""The report from end to end on the CPU, its resumption, its goals, and the README's section."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adapterkern.bench import results
from adapterkern.bench.environment import folder_name, git_state
from adapterkern.bench.results import ResultError, Timing
from benchmarks import goals, models, preflight, readme, report, summary, tasks
from benchmarks.__main__ import main

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def without_host(monkeypatch):
    """The host suite has a test of its own, in a process of its own."""
    monkeypatch.setattr(tasks, "_host", lambda result, bench: ())


def options(folder, **more):
    return report.Options(folder, minutes=1, build=False, check=False, tiny=True, **more)


def header_backends(result):
    assert {tuple(entry["backends"]) for entry in result.log} == {tuple(result.header["backends"])}
    return result.header["backends"]


@no_gpu
def test_the_report_runs_from_end_to_end_on_a_cpu(tmp_path, capsys):
    command = ["report", "--out", str(tmp_path / "new"), "--minutes", "1"]
    assert main([*command, "--skip-build", "--skip-check", "--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no GPU here: sizes for a CPU, and nothing about the kernels"
    assert [line.split(":")[1].split(",")[0] for line in lines[2:8]] == [" done"] * 6
    (path,) = (tmp_path / "new").glob("*.json")
    result = results.load(path)
    assert {row.provider for row in result.rows} == {"reference", "plain", "addmm"}
    assert {row.variant for row in result.models} >= {"plain", "lora", "adapterkern"}
    assert {row.variant for row in result.models if row.mode == "decode"} == set(models.PATCHED)
    assert header_backends(result) == ["reference"]
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
    assert "## AdapterHub, stock and patched" in text
    assert "stock over patched" not in text  # a CPU makes no claim
    names = sorted(entry.name for entry in (tmp_path / "new").glob("*.png"))
    assert names == [f"{path.stem}-models-{part}.png" for part in ("adapterhub", "block")]


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
    assert len(after.log) == 6
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
    assert [entry["status"] for entry in result.log] == ["done"] * 2 + ["failed"] * 3 + ["done"]
    assert len(result.rows) == 6
    assert "no such thing" in path.with_suffix(".md").read_text()


@no_gpu
def test_what_does_not_fit_in_the_time_is_named_and_can_be_run_later(tmp_path, without_host):
    short = report.Options(tmp_path, minutes=1e-4, build=False, check=False, tiny=True)
    path = report.run(short, lambda _text: None)
    result = results.load(path)
    assert {entry["status"] for entry in result.log} == {"out of time"}
    (line,) = [
        line for line in path.with_suffix(".md").read_text().splitlines() if "out of time" in line
    ]
    assert all(entry["task"] in line for entry in result.log)
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


def test_a_step_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); "
        f"open({str(pid)!r}, 'w').write(str(child.pid)); print('3 failed so far', flush=True); "
        "child.wait()"
    )
    outcome = preflight.run([sys.executable, "-c", code], 2)
    assert outcome["status"] == "out of time"
    assert outcome["seconds"] < 20
    assert outcome["says"] == "3 failed so far"
    assert is_gone(int(pid.read_text()))


def is_gone(pid):
    """Whether a process ended; one that nobody has waited for yet counts."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_the_build_takes_nothing_from_the_time_of_the_checks(tmp_path, monkeypatch):
    now, limits = [1000.0], {}

    def run(command, seconds):
        limits[command[0]] = seconds
        now[0] += {"build": 120.0, "check": 10.0}.get(command[0], 0.0)
        return {"status": "passed", "seconds": 0.0, "says": ""}

    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(preflight, "run", run)
    names = ("build", "check", "gpu_tests")
    monkeypatch.setattr(preflight, "steps", lambda quick, build: {name: [name] for name in names})
    result = results.Result({"device_type": "cuda", "outcomes": {}})
    report._preflight(result, tmp_path / "r.json", report.Options(tmp_path), 1540.0, lambda _t: 0)
    assert limits["build"] == pytest.approx(0.5 * 540)
    share = report.PREFLIGHT_SHARE * (540 - 120)
    assert limits["check"] == pytest.approx(0.6 * share)
    assert limits["gpu_tests"] == pytest.approx(share - 10)


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


def test_rows_of_the_same_key_are_replaced(gpu_result):
    again = copy.deepcopy(gpu_result.rows[1])
    again.note = "again"
    merged = tasks.replaced(gpu_result.rows, [again])
    assert len(merged) == len(gpu_result.rows)
    assert merged[-1].note == "again"
    again.timings = {}
    kept = tasks.replaced(gpu_result.rows, [again])
    assert kept == gpu_result.rows  # what was timed is not given up for a failure


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
    text = page.read_text()
    assert text.startswith(
        f"before\n{readme.BEGIN}\n{readme.NO_RESULT}\n\n| goal | promise | state |"
    )
    verdicts = goals.verdicts(results.Result())
    assert text.count("| not measured |") == len({v.goal for v in verdicts})
    assert all(v.promise in text for v in verdicts)
    assert text.endswith(f"|\n{readme.END}\nafter\n")

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
    assert "[all rows](benchmarks/results/made-up-gpu/a-newer.md)" in text
    assert (folder / "made-up-gpu" / "a-newer.md").exists()
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


@no_gpu
def test_without_matplotlib_the_report_says_so_first_and_goes_on(
    tmp_path, monkeypatch, without_host
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    path = report.run(options(tmp_path), said.append)
    assert said[1].startswith("no pictures: matplotlib cannot be imported")
    assert path.with_suffix(".md").exists()
    assert not list(tmp_path.glob("*.png"))
    assert len(results.load(path).rows) == 6


@no_gpu
def test_a_tree_without_git_takes_its_commit_from_the_command_line(
    tmp_path, monkeypatch, without_host
):
    monkeypatch.setattr(report.environment, "git_state", lambda _root: (None, None))
    path = report.run(options(tmp_path, commit="fedcba9876543210"), lambda _text: None)
    assert path.stem.endswith("-fedcba987")
    assert results.load(path).header["commit"] == "fedcba9876543210"
