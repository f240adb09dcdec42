"""Timers: samples in turn, failures that stay alone, and the GPU's timer on a stand-in."""

import contextlib

import pytest
import torch

from adapterkern.bench import timing
from adapterkern.bench.timing import CudaTimer, Subject, WallTimer, interleave, quantiles


def test_quantiles_interpolate_between_samples():
    found = quantiles([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    assert (found.p20, found.p50, found.p80, found.samples) == (20.0, 35.0, 50.0, 6)
    assert quantiles([7.0]).p80 == 7.0
    with pytest.raises(ValueError, match="no samples"):
        quantiles([])


def test_subjects_are_sampled_in_turn_and_the_first_round_is_discarded():
    order = []

    def sample(name, _subject):
        order.append(name)
        return 1000.0 if len(order) <= 3 else 1.0

    subjects = {name: Subject([]) for name in "abc"}
    found = interleave(subjects, sample, seconds=0.0)
    assert "".join(order) == "abc" * (timing.MIN_SAMPLES + 1)
    assert {name: (t.p80, t.samples) for name, t in found.items()} == dict.fromkeys(
        "abc", (1.0, timing.MIN_SAMPLES)
    )


def test_sampling_ends_at_its_time_or_at_its_most_samples():
    now = iter(range(10_000))
    found = interleave({"a": Subject([])}, lambda *_: 1.0, 50.0, clock=lambda: next(now))
    assert found["a"].samples == 54  # asked at 0, and after the fifth round 1, 2, ... up to 50
    frozen = interleave({"a": Subject([])}, lambda *_: 1.0, 50.0, clock=lambda: 0.0)
    assert frozen["a"].samples == timing.MAX_SAMPLES


def test_a_subject_that_raises_is_left_out_and_the_others_go_on():
    def sample(name, _subject):
        if name == "bad":
            raise RuntimeError("boom")
        return 2.0

    subjects = {"good": Subject([]), "bad": Subject([])}
    found = interleave(subjects, sample, 0.0)
    assert list(found) == ["good"]
    assert str(subjects["bad"].failure) == "boom"


def test_the_wall_timer_takes_buffers_in_turn():
    calls = []
    subject = Subject([lambda: calls.append(0), lambda: calls.append(1)])
    found = WallTimer().measure("eager", {"a": subject}, 0.0)
    assert calls == [0, 1] * 3
    assert found["a"].p50 > 0


class StandIn:
    """torch.cuda with a clock that each piece of work moves on by a known time."""

    def __init__(self):
        self.now, self.log, self.recorded = 0.0, [], None
        self.CUDAGraph = lambda: self._Graph(self)

    def work(self, name, milliseconds):
        self.log.append(name)
        if self.recorded is not None:
            self.recorded.append((name, milliseconds))
        else:
            self.now += milliseconds

    class _Graph:
        def __init__(self, gpu):
            self.gpu, self.work = gpu, []

        def replay(self):
            for name, milliseconds in self.work:
                self.gpu.work(name, milliseconds)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.recorded = graph.work
        yield
        self.recorded = None

    def event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def synchronize(self):
                gpu.log.append("wait")

            def elapsed_time(self, other):
                return other.at - self.at

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    stand_in = StandIn()
    replacements = {
        "Event": stand_in.event,
        "Stream": lambda *_: None,
        "synchronize": lambda *_: stand_in.log.append("wait"),
        "_sleep": lambda cycles: stand_in.work("busy", 1.0),
        "CUDAGraph": stand_in.CUDAGraph,
        "graph": stand_in.graph,
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing.torch, "empty", lambda *_, **__: Flush(stand_in))
    return stand_in


class Flush:
    def __init__(self, gpu):
        self.zero_ = lambda: gpu.work("flush", 0.5)


def test_a_cold_call_is_timed_alone_after_the_flush(gpu):
    timer = CudaTimer(torch.device("cuda"))
    subject = Subject([lambda: gpu.work("call", 0.25)])
    found = timer.measure("cold", {"a": subject}, 0.0)
    assert found["a"].p50 == pytest.approx(250.0)
    assert gpu.log[:4] == ["busy", "flush", "call", "wait"]


def test_a_hot_call_finds_its_input_just_written(gpu):
    timer = CudaTimer(torch.device("cuda"))
    subject = Subject([lambda: gpu.work("call", 0.25)], produce=lambda: gpu.work("write", 3.0))
    found = timer.measure("hot", {"a": subject}, 0.0)
    assert found["a"].p50 == pytest.approx(250.0)
    assert gpu.log[:4] == ["busy", "write", "call", "wait"]


def test_a_graph_holds_calls_over_all_buffers_and_is_timed_per_call(gpu):
    timer = CudaTimer(torch.device("cuda"))
    calls = [lambda index=index: gpu.work(f"call {index}", 0.1) for index in range(3)]
    found = timer.measure("graph", {"a": Subject(calls)}, 0.0)
    assert found["a"].p50 == pytest.approx(100.0)
    graph, count = timer.capture(Subject(calls))
    assert count == 18  # the most under CALLS_IN_GRAPH that takes each buffer equally often
    assert [name for name, _ in graph.work] == ["call 0", "call 1", "call 2"] * 6


def test_what_cannot_be_captured_fails_alone(gpu):
    def refuse():
        if gpu.recorded is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    timer = CudaTimer(torch.device("cuda"))
    subjects = {"bad": Subject([refuse]), "good": Subject([lambda: gpu.work("call", 0.1)])}
    found = timer.measure("graph", subjects, 0.0)
    assert list(found) == ["good"]
    assert "capturing" in str(subjects["bad"].failure)


def test_host_time_does_not_wait_for_the_gpu(gpu):
    timer = CudaTimer(torch.device("cuda"))
    host = timer.host_us(Subject([lambda: gpu.work("call", 5.0)]))
    assert 0 < host < 1000
    first = gpu.log.index("call")
    assert "wait" not in gpu.log[first : first + timing.CALLS_IN_EAGER]


def test_eager_time_includes_the_completion(gpu):
    timer = CudaTimer(torch.device("cuda"))
    timer.measure("eager", {"a": Subject([lambda: gpu.work("call", 1.0)])}, 0.0)
    assert gpu.log[: timing.CALLS_IN_EAGER + 2] == [
        "wait",
        *["call"] * timing.CALLS_IN_EAGER,
        "wait",
    ]


@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
def test_every_kind_of_gpu_timing_reaches_the_row(gpu, monkeypatch, mode):
    from adapterkern.bench import measure
    from adapterkern.bench.calibration import Calibration
    from adapterkern.bench.cases import BenchCase
    from adapterkern.bench.measure import Settings, measure_case
    from adapterkern.bench.providers import providers

    timer = CudaTimer(torch.device("cpu"))  # tensors that exist here, events of the stand-in
    monkeypatch.undo()
    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: gpu.work("other", 0.1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", gpu.CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", gpu.graph)
    monkeypatch.setattr(timer, "session", contextlib.nullcontext)
    case = BenchCase(32, 4, 16, "fp32", "gelu", mode)
    monkeypatch.setattr(measure, "headline", lambda *_: "eager")
    assert measure._distinct_buffers(case, timer) == timing.CALLS_IN_GRAPH
    chosen = providers(["reference", "plain", "addmm", "limit"])
    rows = measure_case(case, chosen, timer, Calibration(), Settings(seconds=0.0))
    for row in rows:
        assert (row.status, row.note if row.provider != "limit" else "") == ("ok", "")
        assert list(row.timings) == list(timing.KINDS)
        assert {t.samples for t in row.timings.values()} == {timing.MIN_SAMPLES}
        assert row.host_us > 0


def test_a_large_case_is_timed_on_fewer_buffers():
    from adapterkern.bench import measure
    from adapterkern.bench.cases import BenchCase

    timer = object.__new__(CudaTimer)
    # x and dy of 16384 x 1024 x 2 B are 64 MiB: three of them exceed three L2s of 50 MB.
    assert measure._distinct_buffers(BenchCase(1024, 64, 16384), timer) == 3
    assert measure._distinct_buffers(BenchCase(8192, 128, 65536), timer) == 1


def test_eager_time_is_taken_where_the_host_decides():
    from adapterkern.bench import measure
    from adapterkern.bench.cases import BenchCase

    timer = object.__new__(CudaTimer)
    assert measure.kinds(BenchCase(64, 8, 2048), timer) == ["cold", "hot", "graph", "eager"]
    assert measure.kinds(BenchCase(64, 8, 4096), timer) == ["cold", "hot", "graph"]
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert measure.headline(BenchCase(64, 8, 4096), gpu) == "graph"
    assert measure.headline(BenchCase(64, 8, 4097), gpu) == "cold"
    assert measure.headline(BenchCase(64, 8, 4097), cpu) == "eager"
