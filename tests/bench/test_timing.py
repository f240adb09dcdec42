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
        self.launching = 0.0  # milliseconds from the first launch of a sample to its last
        self.undone = []
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

        def reset(self):
            self.gpu.undone.append("graph")

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        self.recorded = graph.work
        try:
            yield
        except RuntimeError as error:  # as torch: the end of a broken capture raises by itself
            raise RuntimeError("operation failed due to a previous error") from error
        finally:
            self.recorded = None

    def busy(self, cycles):
        self.busy_since = self.now
        self.work("busy", cycles / timing.BUSY_CYCLES)

    def event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def query(self):
                return self.at <= gpu.busy_since + gpu.launching

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
        "_sleep": stand_in.busy,
        "current_device": lambda: 0,
        "default_generators": [Generator(stand_in)],
        **graph_functions(stand_in),
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    patch_allocator(monkeypatch, stand_in)
    monkeypatch.setattr(timing.torch, "empty", lambda *_, **__: Flush(stand_in))
    return stand_in


def graph_functions(gpu):
    return {
        "CUDAGraph": gpu.CUDAGraph,
        "graph": gpu.graph,
        "graph_pool_handle": lambda: (0, 7),
    }


def patch_allocator(monkeypatch, gpu):
    def end(index, pool):
        gpu.undone.append((index, pool))
        raise RuntimeError("not recording to that pool")  # as a version that has undone it

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)


class Generator:
    """The default generator, whose state a broken capture leaves behind."""

    def __init__(self, gpu):
        self.clone_state = lambda: "fresh"
        self.graphsafe_set_state = gpu.undone.append


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
    assert "not permitted" in str(subjects["bad"].failure)  # what broke it, not its end
    assert gpu.undone == [(0, (0, 7)), "graph", "fresh"]


def test_a_sample_is_taken_again_until_the_host_is_ahead(gpu):
    timer = CudaTimer(torch.device("cuda"))
    gpu.launching = 3.0  # the GPU must be busy for longer: 1, 2, then 4 ms, after a flush of 0.5
    subject = Subject([lambda: gpu.work("call", 0.25)])
    found = timer.measure("cold", {"a": subject}, 0.0)
    assert gpu.log[:12] == ["busy", "flush", "call", "wait"] * 3
    assert gpu.log.count("call") == 3 * (timing.MIN_SAMPLES + 1)
    assert found["a"].p50 == pytest.approx(250.0)
    assert not subject.late


def test_a_host_that_never_gets_ahead_is_marked_and_ends(gpu):
    timer = CudaTimer(torch.device("cuda"))
    gpu.launching = 1e6
    late, quick = Subject([lambda: gpu.work("call", 0.25)]), Subject([lambda: None])
    timer.measure("hot", {"late": late}, 0.0)
    assert gpu.log.count("call") == 6 * (timing.MIN_SAMPLES + 1)  # 1, 2, 4, 8, 16, 32 ms
    assert late.late
    gpu.launching = 0.0
    timer.measure("hot", {"quick": quick}, 0.0)
    assert not quick.late


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
    stand_in_for_gpu(monkeypatch, gpu, timer)
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
        assert row.buffer_bytes == 20 * 2 * 16 * 32 * 4


def stand_in_for_gpu(monkeypatch, gpu, timer):
    """CPU tensors, and torch.cuda's events and graphs of the stand-in."""
    monkeypatch.undo()
    functions = {
        "synchronize": lambda *_: gpu.work("other", 0.1),
        "_sleep": gpu.busy,
        "current_device": lambda: 0,
        "default_generators": [Generator(gpu)],
        **graph_functions(gpu),
    }
    for name, value in functions.items():
        monkeypatch.setattr(torch.cuda, name, value)
    patch_allocator(monkeypatch, gpu)
    monkeypatch.setattr(timer, "session", contextlib.nullcontext)


def test_host_time_comes_first_and_the_profiler_last(gpu, monkeypatch):
    from adapterkern.bench import measure, memory
    from adapterkern.bench.calibration import Calibration
    from adapterkern.bench.cases import BenchCase
    from adapterkern.bench.measure import Settings, measure_case
    from adapterkern.bench.providers import providers

    timer = CudaTimer(torch.device("cpu"))
    stand_in_for_gpu(monkeypatch, gpu, timer)
    order = []

    def logged(name, function):
        def call(*arguments):
            order.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(timer, "host_us", logged("host", timer.host_us))
    monkeypatch.setattr(timer, "measure", logged("time", timer.measure))
    monkeypatch.setattr(memory, "allocated", logged("memory", memory.allocated))
    monkeypatch.setattr(memory, "kernels_launched", logged("profiler", lambda *_: 3))
    monkeypatch.setattr(measure, "headline", lambda *_: "eager")
    case = BenchCase(32, 4, 16, "fp32", "gelu", "forward")
    chosen = providers(["reference", "plain"])
    rows = measure_case(case, chosen, timer, Calibration(), Settings(seconds=0.0))
    assert order == ["host", "memory"] * 2 + ["time"] * 4 + ["profiler"] * 2
    assert [row.kernels for row in rows] == [3, 3]

    def broken(*_):
        raise ValueError("no profiler")

    monkeypatch.setattr(memory, "kernels_launched", broken)
    (row,) = measure_case(case, chosen[1:], timer, Calibration(), Settings(seconds=0.0))
    assert (row.status, row.kernels) == ("ok", None)
    assert row.note == "kernels not counted: ValueError: no profiler"


def test_a_provider_whose_capture_failed_is_not_captured_again(gpu, monkeypatch):
    from dataclasses import replace

    from adapterkern.bench import measure, providers
    from adapterkern.bench.calibration import Calibration
    from adapterkern.bench.cases import BenchCase
    from adapterkern.bench.measure import Settings, measure_case

    timer = CudaTimer(torch.device("cpu"))
    stand_in_for_gpu(monkeypatch, gpu, timer)
    monkeypatch.setattr(measure, "headline", lambda *_: "eager")
    plain = providers.PROVIDERS["plain"]

    def build(case, inputs):
        built = plain.build(case, inputs)

        def forward(x):
            if gpu.recorded is not None:
                gpu.work("tried", 0.0)
                raise RuntimeError("a copy to the host")
            return built.forward(x)

        return replace(built, forward=forward)

    chosen = [replace(plain, name="syncs", build=build), plain]
    case = BenchCase(32, 4, 16, "fp32", "gelu", "forward")
    for note in ("graph: RuntimeError: a copy", "graph: not tried, as it failed before: Runtime"):
        row, other = measure_case(case, chosen, timer, Calibration(), Settings(seconds=0.0))
        assert row.note.startswith(note)
        assert (row.status, list(row.timings)) == ("ok", ["cold", "hot", "eager"])
        assert "graph" in other.timings
    assert gpu.log.count("tried") == 1


def test_a_late_host_is_said_in_the_row(gpu, monkeypatch):
    from adapterkern.bench import measure, providers
    from adapterkern.bench.calibration import Calibration
    from adapterkern.bench.cases import BenchCase
    from adapterkern.bench.measure import Settings, measure_case

    timer = CudaTimer(torch.device("cpu"))
    stand_in_for_gpu(monkeypatch, gpu, timer)
    monkeypatch.setattr(measure, "headline", lambda *_: "eager")
    gpu.launching = 1e6
    case = BenchCase(32, 4, 4096, "fp32", "gelu", "forward")
    chosen = providers.providers(["plain"])
    (row,) = measure_case(case, chosen, timer, Calibration(), Settings(0.0, details=False))
    text = "launches included, the host was behind the GPU"
    assert row.note == f"cold: {text}; hot: {text}; graph: {text}"


def test_a_large_case_is_timed_on_fewer_buffers():
    from adapterkern.bench import measure
    from adapterkern.bench.cases import BenchCase

    timer = object.__new__(CudaTimer)
    # x and dy of 16384 x 1024 x 2 B are 64 MiB: three of them exceed three L2s of 50 MB.
    assert measure._distinct_buffers(BenchCase(1024, 64, 16384), timer) == 3
    assert measure._distinct_buffers(BenchCase(8192, 128, 65536), timer) == 1
    # 20 calls of 16 tokens take turns over 1.25 MiB, which no L2 is too small for.
    few = BenchCase(1024, 64, 16)
    assert measure._distinct_buffers(few, timer) * measure._activations(few) == 1310720


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
