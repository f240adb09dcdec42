"""The measuring worker serves requests, on the CPU and on stand-ins for a GPU."""

import contextlib

import pytest
import torch

from adapterkern.backends.base import allow_tf32
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.results import LostDeviceError, ModelRow, Row, Timing
from adapterkern.bench.timing import CudaTimer
from benchmarks import tasks
from benchmarks.gpu import worker, workload

ONE = Timing(1.0, 1.0, 1.0, 5)


@pytest.fixture
def cpu():
    return tasks.Bench.here(tiny=True)


@pytest.fixture
def gpu():
    timer = object.__new__(CudaTimer)
    timer.device = torch.device("cpu")
    timer.session = contextlib.nullcontext
    return tasks.Bench(timer, ["triton", "cuda"])


def asked(task, **more):
    return {**task.request, "calibration": {}, **more}


def test_an_adapter_on_the_cpu_is_measured_for_every_provider(cpu):
    request = asked(workload.adapter(1024, 64, 16384, "step", seconds=1))
    found = list(tasks.run(cpu, request))
    assert {kind for kind, _ in found} == {"row"}
    rows = {entry["content"]["provider"]: entry["content"] for _, entry in found}
    assert set(rows) == {"reference", *workload.QUICK}
    assert rows["reference"]["status"] == "ok"
    assert rows["reference"]["timings"]["eager"]["p50"] > 0
    assert rows["reference"]["case"]["hidden_size"] == 32


def test_many_adapters_on_the_cpu_are_two(cpu):
    found = [content["content"] for _, content in tasks.run(cpu, asked(workload.MANY[5]))]
    assert workload.MANY[5].name == "step-bf16-gelu-T2048-H1024-R64-A16_zipf"
    rows = {row["provider"]: row for row in found}
    assert set(rows) == {"reference", *workload.OF_MANY}
    assert {(row["case"]["adapters"], row["case"]["mix"]) for row in found} == {(2, "zipf")}
    assert {name for name, row in rows.items() if row["status"] != "ok"} == {"lora-mixed"}


@pytest.mark.parametrize(
    ("name", "mode"), [("block-1024", "forward"), ("gpt2-medium-16x256-seq_bn", "decode")]
)
def test_a_model_on_the_cpu_runs_in_every_variant(cpu, name, mode):
    found = list(tasks.run(cpu, asked(workload.model(name, mode, "graph"))))
    rows = [entry["content"] for _, entry in found]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["execution"] for row in rows} == {"eager"}
    assert all("widths of a few units" in row["note"] for row in rows)


@pytest.mark.thorough
def test_the_host_suite_gives_microseconds(cpu, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # there pytest-benchmark times nothing
    found = [entry["content"] for _, entry in tasks.run(cpu, {"do": "host", "calibration": {}})]
    assert {entry["name"] for entry in found} == {
        "test_function[inference]",
        "test_function[training]",
    }
    assert all(entry["median_us"] > 0 for entry in found)


def test_a_calibration_is_not_of_an_idle_gpu(gpu, monkeypatch):
    happened = []
    measured = Calibration(copy_bandwidth=3e12, l2_bandwidth=5e12)
    monkeypatch.setattr(tasks.calibration, "copy_bandwidth", lambda *_: happened.append("copy"))
    monkeypatch.setattr(
        tasks.environment, "clocks", lambda _: happened.append("clocks") or {"sm_mhz": 1980.0}
    )
    monkeypatch.setattr(tasks.triton_rates, "measure", lambda *_: measured)
    ((kind, content),) = tasks.run(gpu, asked(workload.CALIBRATE))
    assert kind == "calibration"
    assert content["values"] == {"copy_bandwidth": 3e12, "l2_bandwidth": 5e12}
    assert content["clocks"] == {"sm_mhz": 1980.0}
    assert happened == ["copy", "clocks"]


def test_a_second_calibration_adds_to_the_first(gpu, monkeypatch):
    monkeypatch.setattr(
        tasks.calibration,
        "measure_after",
        lambda timer, before: Calibration(before.copy_bandwidth, copy_bandwidth_after=2.9e12),
    )
    monkeypatch.setattr(tasks.environment, "clocks", lambda _: None)
    request = asked(workload.CALIBRATE_AGAIN, calibration={"copy_bandwidth": 3e12, "other": 1.0})
    ((_, content),) = tasks.run(gpu, request)
    assert content["values"] == {
        "copy_bandwidth": 3e12, "copy_bandwidth_after": 2.9e12, "other": 1.0,
    }  # fmt: skip


def test_requests_choose_backends_precision_and_kinds(gpu, monkeypatch):
    seen = []

    def measured(case, providers, timer, calibration, settings):
        names = [entry.name for entry in providers]
        seen.append((names, calibration, settings.hot, allow_tf32()))
        return [Row(case, "triton", note="a", timings={"cold": ONE}, headline="cold")]

    monkeypatch.setattr(tasks, "measure_case", measured)
    monkeypatch.setattr(tasks.calibration, "matrix_rate", lambda *_: 4e14 if allow_tf32() else 5e13)
    sizes = 1024, 64, 16384, "forward", "fp32"
    plain = workload.adapter(*sizes, seconds=1)
    values = {"copy_bandwidth": 3e12}
    list(tasks.run(gpu, asked(plain, calibration=values)))
    list(tasks.run(gpu, asked(plain.narrowed("cuda"))))
    found = list(tasks.run(gpu, asked(workload.adapter(*sizes, seconds=1, tf32=True, hot=True))))
    assert seen[0][0] == ["triton", "cuda", *workload.QUICK]
    assert seen[0][1].copy_bandwidth == 3e12
    assert seen[1][0] == ["cuda", "plain", "limit"]
    assert [entry[2:] for entry in seen] == [(False, False), (False, False), (True, True)]
    assert not allow_tf32()
    assert seen[2][1].matrix_rate_fp32 == 4e14
    assert found[0] == ("calibration", {"values": {"matrix_rate_tf32": 4e14}})
    assert found[1][1]["content"]["note"] == "a; TF32"


def rows_with(*states):
    case = BenchCase(32, 4, 8)
    rows = [Row(case, f"p{index}", status, note="why") for index, status in enumerate(states)]
    for row in rows:
        row.headline = "cold"
        row.timings = {"cold": ONE} if row.status == "ok" else {}
    return rows


@pytest.mark.parametrize(
    ("states", "fails"),
    [
        (("failed", "out_of_memory"), True),
        (("failed", "unavailable"), True),
        (("failed", "ok"), False),
        (("unavailable", "unavailable"), False),
    ],
)
def test_a_task_without_a_single_time_fails_after_its_rows(states, fails):
    found = []
    expectation = pytest.raises(RuntimeError, match="nothing was timed: why")
    with expectation if fails else contextlib.nullcontext():
        found.extend(tasks._rows(rows_with(*states)))
    assert len(found) == 2


def test_a_copy_of_memory_is_no_implementation():
    rows = rows_with("failed", "ok")
    rows[1].provider = "limit"
    with pytest.raises(RuntimeError, match="nothing was timed"):
        list(tasks._rows(rows))
    model = ModelRow("m", "plain", "forward", "graph", "failed", "no room")
    with pytest.raises(RuntimeError, match="no room"):
        list(tasks._rows([model]))


class Replies(list):
    def __call__(self, kind, **content):
        self.append((kind, content))


def test_a_failure_is_the_tasks_own(cpu):
    replies = Replies()
    worker.serve(tasks, cpu, asked(workload.model("no such model", "step", "eager")), replies)
    assert replies == [("done", {"status": "failed", "note": "KeyError: 'no such model'"})]


def test_rows_measured_before_the_device_was_lost_are_kept(gpu, monkeypatch):
    def lose(*_):
        error = LostDeviceError("CUDA error: an illegal memory access", "cuda")
        error.rows = rows_with("ok")
        raise error

    monkeypatch.setattr(tasks, "measure_case", lose)
    replies = Replies()
    with pytest.raises(LostDeviceError, match="illegal memory access"):
        worker.serve(tasks, gpu, asked(workload.adapter(32, 4, 8, seconds=1)), replies)
    ((kind, content),) = replies
    assert kind == "record"
    assert content["content"]["content"]["provider"] == "p0"


def test_a_failure_that_takes_the_device_along_is_told_from_one_that_does_not(gpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(tasks, "measure_case", fail)
    request = asked(workload.adapter(32, 4, 8, seconds=1))
    replies = Replies()
    monkeypatch.setattr(tasks, "lost_device", lambda device: None)
    worker.serve(tasks, gpu, request, replies)
    assert replies == [("done", {"status": "failed", "note": "RuntimeError: boom"})]
    monkeypatch.setattr(tasks, "lost_device", lambda device: "synchronize fails")
    with pytest.raises(LostDeviceError, match="RuntimeError: boom; synchronize fails"):
        worker.serve(tasks, gpu, request, replies)


def test_the_kernels_that_can_run_are_asked_in_the_order_of_auto(monkeypatch):
    class Backend:
        def __init__(self, reason):
            self.unavailable_reason = lambda: reason

    reasons = {"triton": None, "cuda": "not built", "reference": None}
    monkeypatch.setattr(tasks, "get", lambda name: Backend(reasons[name]))
    assert tasks.fused_backends(on_gpu=True) == ["triton"]
    assert tasks.fused_backends(on_gpu=False) == ["reference"]
    reasons["cuda"] = None
    assert tasks.fused_backends(on_gpu=True) == ["triton", "cuda"]
