"""Reports on a GPU, from stand-ins for it: what they keep when it is lost, and how they go on."""

import contextlib
import copy

import pytest
import torch

from adapterkern.backends.base import allow_tf32
from adapterkern.bench import results
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.results import ResultError, Row, Timing
from adapterkern.bench.timing import CudaTimer
from benchmarks import pictures, readme, report, tasks
from benchmarks.__main__ import main


def gpu_timer():
    timer = object.__new__(CudaTimer)
    timer.device = torch.device("cpu")
    timer.session = contextlib.nullcontext
    return timer


def test_the_calibration_of_a_gpu_goes_into_the_header(gpu_result, monkeypatch):
    happened = []
    measured = Calibration(copy_bandwidth=3e12, l2_bandwidth=5e12)
    monkeypatch.setattr(
        tasks.package, "copy_bandwidth", lambda timer, seconds: happened.append("copy")
    )
    monkeypatch.setattr(
        tasks.environment, "clocks", lambda device: happened.append("clocks") or {"sm_mhz": 1980.0}
    )
    monkeypatch.setattr(tasks.calibration, "measure", lambda timer, seconds: measured)
    tasks._calibrate(gpu_result, tasks.Bench(gpu_timer(), ["triton"]))
    assert gpu_result.header["calibration"] == {"copy_bandwidth": 3e12, "l2_bandwidth": 5e12}
    assert gpu_result.header["clocks_before"] == {"sm_mhz": 1980.0}
    assert happened == ["copy", "clocks"]  # not of an idle GPU


def close(result, path):
    report._close(result, path, torch.device("cuda"), None)
    return results.load(path)


def test_a_gpu_report_ends_with_a_second_copy_and_the_clocks(gpu_result, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "timer_for", lambda _device: gpu_timer())
    monkeypatch.setattr(report.calibration, "copy_bandwidth", lambda timer, seconds: 3.5e12)
    monkeypatch.setattr(report.environment, "clocks", lambda _device: {"sm_mhz": 1980.0})
    path = tmp_path / "report.json"
    saved = close(gpu_result, path)
    assert saved.header["calibration"]["copy_bandwidth_after"] == 3.5e12
    assert saved.header["clocks_after"] == {"sm_mhz": 1980.0}
    text = path.with_suffix(".md").read_text()
    assert "UNSTEADY" in text
    assert "| G2 | forward against adapterhub >= 3.10x | met | 3.48x |" in text
    assert readme.UNSTEADY in readme.section(path, tmp_path)


def lost(*_arguments):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_lost_gpu_leaves_file_summary_and_pictures(gpu_result, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "timer_for", lost)
    path = tmp_path / "report.json"
    saved = close(gpu_result, path)
    assert saved.rows == gpu_result.rows
    assert saved.header["outcomes"]["second copy"]["status"] == "failed"
    assert "second copy: failed in 0.0 s (RuntimeError: CUDA error" in (
        path.with_suffix(".md").read_text()
    )
    names = sorted(entry.name for entry in tmp_path.glob("*.png"))
    assert names == [f"report-{part}.png" for part in ("forward", "models-block", "step")]


def test_one_picture_that_fails_leaves_the_others(gpu_result, tmp_path, monkeypatch):
    plot = pictures.plot
    monkeypatch.setattr(
        pictures, "plot", lambda part, path: lost() if "step" in path.name else plot(part, path)
    )
    monkeypatch.setattr(report, "timer_for", lambda _device: None)
    saved = close(gpu_result, tmp_path / "report.json")
    assert "report-step.png" in saved.header["outcomes"]["pictures"]["says"]
    assert (tmp_path / "report-forward.png").exists()
    assert not (tmp_path / "report-step.png").exists()


def test_a_gpu_that_is_lost_ends_the_measuring_and_the_next_run_goes_round_it(
    gpu_result, tmp_path, monkeypatch
):
    """Three tasks, the second of which takes the GPU with it."""
    ran = []
    work = [tasks.Task(name, 0, lambda r, b, name=name: ran.append(name) or ()) for name in "abc"]
    monkeypatch.setattr(report, "tasks", lambda _bench: list(work))
    monkeypatch.setattr(report, "timer_for", lambda _device: gpu_timer())
    monkeypatch.setattr(report, "_backends", lambda *_given: ["triton"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran[-1] != "b" or lost())
    gpu_result.log = []
    path = tmp_path / "r.json"

    def measure():
        ran.clear()
        report._attempt(
            gpu_result,
            "measuring",
            lambda: report._measure(
                gpu_result, path, report.Options(tmp_path), 9e9, lambda _text: None
            ),
        )
        return list(ran), {entry["task"]: entry["status"] for entry in gpu_result.log}

    assert measure() == (["a", "b"], {"a": "done", "b": "failed", "c": "not run"})
    assert "the GPU was lost in b" in gpu_result.header["outcomes"]["measuring"]["says"]
    assert measure() == (["c", "b"], {"a": "done", "b": "failed", "c": "done"})
    work[1] = tasks.Task("b", 0, lambda r, b: ran.append("mended") or ())
    assert measure() == (["mended"], dict.fromkeys("acb", "done"))
    assert "measuring" not in gpu_result.header["outcomes"]


def test_a_task_without_a_single_time_is_not_done(gpu_result):
    rows = copy.deepcopy(gpu_result.rows[:2])
    bench = tasks.Bench(gpu_timer(), ["triton"])

    def status(*states):
        for row, state in zip(rows, states, strict=True):
            row.status, row.note = state, "why"
            row.timings = {"cold": Timing(1, 1, 1, 5)} if state == "ok" else {}
        entry = report._run_task(tasks.Task("t", 0, lambda r, b: rows), gpu_result, bench, 1)
        return entry["status"]

    assert status("failed", "out_of_memory") == "failed"
    assert status("failed", "unavailable") == "failed"
    assert status("failed", "ok") == "done"
    assert status("unavailable", "unavailable") == "done"  # nor will it run the next time
    rows[1].provider = "limit"  # a copy of memory is no implementation
    assert status("failed", "ok") == "failed"


def test_another_backend_is_measured_when_a_report_goes_on():
    entry = {"task": "t", "status": "done", "seconds": 1, "backends": ["triton", "cuda"]}
    timer = gpu_timer()
    assert report._is_done(entry, tasks.Bench(timer, ["triton", "cuda"]))
    assert report._is_done(entry, tasks.Bench(timer, ["triton"]))
    assert not report._is_done({**entry, "backends": ["triton"]}, tasks.Bench(timer, ["cuda"]))
    assert not report._is_done({**entry, "status": "failed"}, tasks.Bench(timer, ["triton"]))


def test_another_version_begins_another_file(tmp_path):
    header = {"commit": "abc", "dirty": False, "device": "d", "created": "now"}
    header["versions"] = {"torch": "2.9.0"}
    path, result = report._begin(tmp_path, header)
    results.save(result, path)
    assert report._begin(tmp_path, header)[0] == path
    newer = {**header, "versions": {"torch": "2.10.0"}}
    other, fresh = report._begin(tmp_path, newer)
    assert other != path
    assert "resumed" not in fresh.header


def test_an_unknown_backend_is_refused(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path), "--backend", "opencl"]) == 2
    assert "unknown backend 'opencl'; known: triton, cuda, reference" in capsys.readouterr().err


def test_adapter_tasks_use_the_backends_and_calibration_of_the_run(gpu_result, monkeypatch):
    seen = []

    def measured(case, providers, timer, calibration, settings):
        seen.append(([entry.name for entry in providers], calibration, allow_tf32()))
        return [Row(case, "triton", note="a")]

    monkeypatch.setattr(tasks, "measure_case", measured)
    monkeypatch.setattr(tasks.package, "matrix_rate", lambda *given: 4e14 if allow_tf32() else 5e13)
    bench = tasks.Bench(gpu_timer(), ["triton"])
    work = {task.name: task for task in tasks.tasks(bench)}
    work["adapter backward-bf16-gelu-T16384-H1024-R64"].run(gpu_result, bench)
    work["compiled forward-bf16-gelu-T16384-H1024-R64"].run(gpu_result, bench)
    (row,) = work["adapter forward-fp32-gelu-T16384-H1024-R64 TF32"].run(gpu_result, bench)
    (quick, half, _), (full, _, tf32), (_, single, tf32_then) = seen
    assert half.copy_bandwidth == 4.0e12
    assert quick[0] == "triton"
    assert set(full) - set(quick) == {"compile", "compile-max"}
    assert (tf32, tf32_then, allow_tf32()) == (False, True, False)
    assert row.note == "a; TF32"
    assert single.matrix_rate_fp32 == 4e14
    assert gpu_result.header["calibration"]["matrix_rate_tf32"] == 4e14


def test_a_picture_that_cannot_be_drawn_is_not_left_out_of_the_readme(
    gpu_result, tmp_path, monkeypatch
):
    (tmp_path / "gpu").mkdir()
    results.save(gpu_result, tmp_path / "gpu" / "a.json")
    monkeypatch.setattr(pictures, "plot", lost)
    with pytest.raises(ResultError, match=r"a-forward\.png: RuntimeError: CUDA error"):
        readme.write(tmp_path / "README.md", tmp_path)


def test_a_named_backend_runs_alone_or_not_at_all(monkeypatch):
    class Backend:
        def __init__(self, reason):
            self.unavailable_reason = lambda: reason

    found = {"triton": None, "cuda": "the extension was not built", "reference": None}
    monkeypatch.setattr(report, "get", lambda name: Backend(found[name]))
    assert report._backends(True) == ["triton"]
    assert report._backends(False) == ["reference"]
    assert report._backends(True, ("reference", "triton")) == ["triton", "reference"]
    with pytest.raises(RuntimeError, match="backend cuda cannot run here: the extension was not"):
        report._backends(True, ("cuda",))
