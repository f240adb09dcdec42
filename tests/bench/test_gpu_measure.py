"""One case on a stand-in for a GPU: all kinds of timing, what is counted, a device that is lost."""

from dataclasses import replace

import pytest
import torch
from stand_in_gpu import StandIn

from adapterkern.bench import driver, measure, memory, providers, rotation, timing
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.measure import Settings, measure_case
from adapterkern.bench.results import LostDeviceError

CASE = BenchCase(32, 4, 16, "fp32", "gelu", "forward")
PLAIN = providers.PROVIDERS["plain"]
FAST = Settings(seconds=0.0)


@pytest.fixture
def gpu(monkeypatch):
    """Its device is the CPU's, so a headline must be said; few sets of tensors are enough."""
    stand_in = StandIn(monkeypatch)
    monkeypatch.setattr(measure, "headline", lambda *_: "graph")
    monkeypatch.setattr(rotation, "MOST_SETS", 4)
    monkeypatch.setattr(driver, "graph_nodes", lambda graph: len(nodes(stand_in, graph)))
    return stand_in


def nodes(gpu, graph):
    return next(entry.work for entry in gpu.graphs if id(entry) == graph)


def clocked(gpu, name, milliseconds=0.25, base="plain", before=lambda: None):
    """Make a provider that is right and takes a known time."""
    inner = providers.PROVIDERS[base]

    def build(case, inputs):
        built = inner.build(case, inputs)

        def forward(x):
            before()
            gpu.work(name, milliseconds)
            return Clocked.apply(built.forward(x), lambda: gpu.work(name, milliseconds))

        return replace(built, forward=forward)

    return replace(inner, name=name, build=build)


class Clocked(torch.autograd.Function):
    """Returns its input, and its backward takes a known time too."""

    @staticmethod
    def forward(ctx, y, work):
        ctx.work = work
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        ctx.work()
        return dy, None


@pytest.fixture
def limit(gpu):
    """Return the copy, which takes 0.1 ms."""
    inner = providers.PROVIDERS["limit"]

    def build(case, inputs):
        built = inner.build(case, inputs)

        def alone(x, dy):
            call = built.alone(x, dy)
            return lambda: (gpu.work("limit", 0.1), call())[1]

        return replace(built, alone=alone)

    return replace(inner, build=build)


@pytest.mark.sweep
@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
@pytest.mark.parametrize("hot", [False, True])
def test_every_kind_of_timing_reaches_the_row(gpu, limit, mode, hot):
    case = replace(CASE, mode=mode)
    chosen = [clocked(gpu, name, base=name) for name in ("reference", "plain", "addmm")]
    rows = measure_case(case, [*chosen, limit], gpu.timer(), Calibration(), replace(FAST, hot=hot))
    for row in rows:
        assert (row.status, row.note if row.provider != "limit" else "") == ("ok", "")
        wanted = ["cold", "hot", "graph", "eager"] if hot else ["cold", "graph", "eager"]
        assert list(row.timings) == wanted
        assert {t.samples for t in row.timings.values()} == {timing.MIN_SAMPLES}
        assert {len(t.raw) for t in row.timings.values()} == {timing.MIN_SAMPLES}
        assert row.host_us > 0
    assert gpu.log.count("write") == 4 * (timing.MIN_SAMPLES + 1)  # L2, of the cold kind alone
    activations, weights = 2 * 16 * 32 * 4, (2 * 32 * 4 + 32 + 4) * 4
    assert {row.buffer_bytes for row in rows[:3]} == {4 * (activations + weights)}
    assert rows[3].buffer_bytes == 4 * activations
    wanted = {"forward": 250.0, "backward": 250.0, "step": 500.0}[mode]
    for row in rows[:3]:
        assert row.timings["graph"].p50 == row.timings["cold"].p50 == pytest.approx(wanted)


@pytest.mark.thorough
def test_without_a_copy_among_the_providers_the_engine_adds_it(gpu, limit, monkeypatch):
    monkeypatch.setitem(measure.PROVIDERS, "limit", limit)
    rows = measure_case(CASE, [clocked(gpu, "ours")], gpu.timer(), Calibration(), FAST)
    assert [row.provider for row in rows] == ["ours", "limit"]
    assert rows[1].time.p50 == pytest.approx(100.0)
    rows = measure_case(CASE, [limit, clocked(gpu, "ours")], gpu.timer(), Calibration(), FAST)
    assert [row.provider for row in rows] == ["limit", "ours"]


def test_the_calls_of_a_graph_share_neither_weights_nor_input(gpu, limit):
    seen = []
    inner = providers.PROVIDERS["plain"]

    def build(case, inputs):
        built = inner.build(case, inputs)

        def forward(x):
            gpu.work("call", 0.1)
            if gpu.recorded is not None:
                leaves = {name: leaf.data_ptr() for name, leaf in built.parameters.items()}
                seen.append({"x": x.data_ptr(), **leaves})
            return built.forward(x)

        return replace(built, forward=forward)

    chosen = [replace(inner, name="watched", build=build), limit]
    row, _ = measure_case(CASE, chosen, gpu.timer(), Calibration(), replace(FAST, details=False))
    assert row.time.p50 == pytest.approx(100.0)
    calls = rotation.least_calls(CASE)
    assert len(seen) == calls == 128
    for name in seen[0]:
        assert len({entry[name] for entry in seen}) == 4
    assert seen[:4] == seen[4:8]


def test_a_provider_with_weights_of_its_own_gets_no_time_in_a_graph(gpu, limit):
    def build(case, inputs):
        hidden = providers.PROVIDERS["plain"].build(case, inputs)
        leaves = {name: tensor.detach().clone() for name, tensor in hidden.parameters.items()}
        return replace(hidden, parameters=leaves)

    packed = replace(PLAIN, name="packed", build=build)
    rows = measure_case(
        CASE, [packed, clocked(gpu, "good"), limit], gpu.timer(), Calibration(), FAST
    )
    assert list(rows[0].timings) == ["cold", "eager"]
    assert rows[0].time is None
    assert rows[0].status == "ok"
    assert rows[0].note.startswith(
        "graph: FixedWeightsError: other weights in its leaves do not reach it (y: error"
    )
    assert rows[1].time is not None
    assert rows[1].note == ""


@pytest.mark.parametrize(("factor", "timed"), [(1 + 5e-7, True), (1 + 5e-6, False)])
def test_other_weights_may_round_a_little_worse_than_the_gate_allows(gpu, limit, factor, timed):
    def build(case, inputs):
        built = PLAIN.build(case, inputs)
        leaf = built.parameters["up_bias"]
        address = leaf.data_ptr()

        def forward(x):
            gpu.work("rough", 0.25)
            return built.forward(x) * (1.0 if leaf.data_ptr() == address else factor)

        return replace(built, forward=forward)

    rough = replace(PLAIN, name="rough", build=build)
    row, _ = measure_case(CASE, [rough, limit], gpu.timer(), Calibration(), FAST)
    assert ("graph" in row.timings) == timed
    assert row.tolerance < 4e-7


def test_kernels_are_the_nodes_of_one_calls_graph_and_counted_last(gpu, limit, monkeypatch):
    order = []

    def logged(name, function):
        return lambda *arguments: (order.append(name), function(*arguments))[1]

    timer = gpu.timer()
    monkeypatch.setattr(timer, "host_us", logged("host", timer.host_us))
    monkeypatch.setattr(timer, "measure", logged("time", timer.measure))
    monkeypatch.setattr(memory, "allocated", logged("memory", memory.allocated))
    monkeypatch.setattr(memory, "kernels_launched", logged("nodes", memory.kernels_launched))
    chosen = [clocked(gpu, "one"), clocked(gpu, "two", before=lambda: gpu.work("fill")), limit]
    rows = measure_case(CASE, chosen, timer, Calibration(), FAST)
    assert [row.kernels for row in rows] == [1, 2, 1]
    assert order == ["host", "memory"] * 3 + ["time"] * 3 + ["nodes"] * 3


def test_a_count_that_cannot_be_is_said_in_the_row(gpu, limit, monkeypatch):
    def no_library(_graph):
        raise OSError("libcuda.so.1: cannot open")

    def no_option(**options):
        if options:
            raise TypeError("__new__() got an unexpected keyword argument 'keep_graph'")
        return kept()

    monkeypatch.setattr(driver, "graph_nodes", no_library)
    (row, _) = measure_case(CASE, [clocked(gpu, "a"), limit], gpu.timer(), Calibration(), FAST)
    assert (row.status, row.kernels) == ("ok", None)
    assert row.note == "kernels not counted: OSError: libcuda.so.1: cannot open"
    kept = torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", no_option)
    (row, _) = measure_case(CASE, [clocked(gpu, "a"), limit], gpu.timer(), Calibration(), FAST)
    assert (row.status, row.kernels, row.time.samples) == ("ok", None, 5)
    assert row.note.startswith("kernels not counted: TypeError: __new__() got an unexpected")


def test_a_provider_whose_capture_failed_is_not_captured_again(gpu, limit):
    def copy_to_host():
        if gpu.recorded is not None:
            gpu.log.append("tried")
            raise RuntimeError("a copy to the host")

    timer = gpu.timer()
    chosen = [clocked(gpu, "syncs", before=copy_to_host), clocked(gpu, "other"), limit]
    for note in ("graph: RuntimeError: a copy", "graph: not tried, as it failed before: Runtime"):
        row, other, _ = measure_case(CASE, chosen, timer, Calibration(), FAST)
        assert row.note.startswith(note)
        assert row.note.endswith("kernels not counted: RuntimeError: its call cannot be captured")
        assert (row.status, list(row.timings)) == ("ok", ["cold", "eager"])
        assert "graph" in other.timings
    assert gpu.log.count("tried") == 1


def test_a_late_host_is_said_in_the_row(gpu, limit):
    gpu.launching = 1e6
    case = replace(CASE, tokens=4096)
    row, _ = measure_case(
        case, [clocked(gpu, "a"), limit], gpu.timer(), Calibration(), Settings(0.0, details=False)
    )
    text = "launches included, the host was behind the GPU"
    assert row.note == f"cold: {text}; graph: {text}"


@pytest.mark.thorough
def test_a_count_that_fails_costs_no_time(gpu, limit, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(memory, "allocated", full)
    row, _ = measure_case(CASE, [clocked(gpu, "a"), limit], gpu.timer(), Calibration(), FAST)
    assert (row.status, row.kernels) == ("ok", 1)
    assert row.note == "not counted: OutOfMemoryError: no room"
    assert row.time.p50 == pytest.approx(250.0)


@pytest.mark.parametrize(
    ("at", "kept"), [("build", []), ("cold", []), ("graph", ["cold"]), ("count", None)]
)
def test_a_lost_device_ends_the_case_and_keeps_what_was_measured(gpu, limit, at, kept):
    samples = []

    def fatal():
        samples.append(gpu.recorded is not None)
        captured = sum(samples)
        reached = {
            "build": len(samples) == 1,
            "cold": "busy" in gpu.log,
            "graph": captured == 1,
            "count": captured > rotation.least_calls(CASE),
        }
        if reached[at]:
            gpu.log, gpu.lost = [], True
            raise RuntimeError("CUDA error: misaligned address")

    chosen = [clocked(gpu, "good"), clocked(gpu, "fatal", before=fatal), limit]
    with pytest.raises(
        LostDeviceError, match=r"in the work of fatal: .*misaligned address"
    ) as told:
        measure_case(CASE, chosen, gpu.timer(), Calibration(), FAST)
    assert not {"good", "limit"} & set(gpu.log)  # nothing runs on a dead device
    good, bad, copy = told.value.rows
    if kept is None:  # all was timed before
        assert [list(row.timings) for row in told.value.rows] == [["cold", "graph", "eager"]] * 3
        assert bad.note.startswith("kernels not counted: RuntimeError: CUDA error: misaligned")
        return
    assert [list(row.timings) for row in told.value.rows] == [kept] * 3
    assert bad.status == "failed"
    assert "misaligned address" in bad.note
    for row in (good, copy):
        wanted = ("ok", "limit") if kept else ("failed", "not measured: the GPU was lost before")
        assert row.status == wanted[0]
        assert kept or row.note == wanted[1]


def test_a_device_lost_by_work_that_nobody_waited_for_is_noticed_at_the_end(
    gpu, limit, monkeypatch
):
    def collect():
        gpu.lost = True

    monkeypatch.setattr(measure.gc, "collect", collect)
    with pytest.raises(LostDeviceError, match="illegal memory access") as told:
        measure_case(CASE, [clocked(gpu, "a"), limit], gpu.timer(), Calibration(), FAST)
    assert [row.status for row in told.value.rows] == ["ok", "ok"]
    assert told.value.rows[0].time.p50 == pytest.approx(250.0)


def test_kinds_are_those_that_say_something_about_a_case(gpu):
    timer = gpu.timer()
    assert measure.kinds(BenchCase(64, 8, 2048), timer) == ["cold", "graph", "eager"]
    assert measure.kinds(BenchCase(64, 8, 4096), timer) == ["cold", "graph"]
    assert measure.kinds(BenchCase(64, 8, 4096), timer, hot=True) == ["cold", "hot", "graph"]


def test_the_headline_is_the_graph_for_few_tokens():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert measure.headline(BenchCase(64, 8, 4096), cuda) == "graph"
    assert measure.headline(BenchCase(64, 8, 4097), cuda) == "cold"
    assert measure.headline(BenchCase(64, 8, 4097), cpu) == "eager"


def test_a_batch_of_many_adapters_is_timed_in_a_graph_but_where_the_host_has_to_be_asked(
    gpu, limit, monkeypatch
):
    """Its weights are exchanged, and one that cannot be captured spoils no other case."""
    monkeypatch.setitem(measure.PROVIDERS, "limit", limit)
    case = BenchCase(32, 4, 16, "fp32", "gelu", "forward", adapters=4)
    names = ("reference", "single", "loop", "routing")
    chosen = [clocked(gpu, name, base=name) for name in names[:3]]
    routing = providers.PROVIDERS["routing"]

    def build(case, inputs):
        built = routing.build(case, inputs)
        return replace(
            built, alone=lambda x, dy: lambda: (gpu.work("routing", 0.5), built.alone(x, dy)())
        )

    def asking(case, inputs):
        return replace(chosen[2].build(case, inputs), in_graph=False)

    chosen += [replace(routing, build=build), replace(chosen[2], name="asking", build=asking)]
    timer = gpu.timer()
    rows = {r.provider: r for r in measure_case(case, chosen, timer, Calibration(), FAST)}
    assert {row.status for row in rows.values()} == {"ok"}
    for name in (*names, "limit"):
        assert "graph" in rows[name].timings
    asks = rows["asking"]
    assert list(asks.timings) == ["cold", "eager"]
    assert "graph: none can hold what waits for the host" in asks.note
    assert "kernels not counted: RuntimeError: its call cannot be captured" in asks.note
    assert timer.not_captured == {}
    weights = 4 * (2 * 32 * 4 + 32 + 4) * 4
    assert rows["reference"].buffer_bytes == 4 * (2 * 16 * 32 * 4 + weights)
