"""Timers: samples in turn, failures that stay alone, and the GPU's timer on a stand-in."""

from types import SimpleNamespace

import pytest
import torch
from stand_in_gpu import L2, StandIn

from adapterkern.bench import timing
from adapterkern.bench.results import LostDeviceError
from adapterkern.bench.timing import BUSY_CYCLES, Subject, WallTimer, interleave, quantiles

ROUNDS = timing.MIN_SAMPLES + 1  # the first warms up


@pytest.fixture
def gpu(monkeypatch):
    return StandIn(monkeypatch)


def test_quantiles_interpolate_between_samples_and_keep_them_as_they_came():
    found = quantiles([60.0, 10.0, 20.0, 50.0, 30.0, 40.00049])
    assert (found.p20, found.p50, found.p80, found.samples) == (
        *(20.0, pytest.approx(35.0, abs=1e-3), 50.0),
        6,
    )
    assert found.raw == (60.0, 10.0, 20.0, 50.0, 30.0, 40.0)
    assert quantiles([7.0]).p80 == 7.0
    with pytest.raises(ValueError, match="no samples"):
        quantiles([])


def test_subjects_take_turns_in_an_order_that_rotates_and_the_first_round_is_discarded():
    order = []

    def sample(name, _subject):
        order.append(name)
        return 1000.0 if len(order) <= 3 else float(len(order))

    found = interleave({name: Subject([]) for name in "abc"}, sample, seconds=0.0)
    assert "".join(order) == "abcbcacab" * 2
    assert len(order) == 3 * ROUNDS
    assert found["a"].raw == (6.0, 8.0, 10.0, 15.0, 17.0)
    assert interleave({}, sample, 0.0) == {}


def test_sampling_ends_at_its_time_or_at_its_most_samples():
    now = iter(range(10_000))
    found = interleave({"a": Subject([])}, lambda *_: 1.0, 50.0, clock=lambda: next(now))
    assert found["a"].samples == 54  # asked at 0, and after the fifth round 1, 2, ... up to 50
    frozen = interleave({"a": Subject([])}, lambda *_: 1.0, 50.0, clock=lambda: 0.0)
    assert frozen["a"].samples == timing.MAX_SAMPLES == len(frozen["a"].raw)


def test_a_subject_that_raises_is_left_out_and_the_others_go_on():
    def sample(name, _subject):
        if name == "bad":
            raise RuntimeError("boom")
        return 2.0

    subjects = {"good": Subject([]), "bad": Subject([])}
    found = interleave(subjects, sample, 0.0)
    assert list(found) == ["good"]
    assert found["good"].samples == timing.MIN_SAMPLES
    assert str(subjects["bad"].failure) == "boom"


def test_the_wall_timer_takes_buffers_in_turn():
    calls = []
    subject = Subject([lambda: calls.append(0), lambda: calls.append(1)])
    found = WallTimer().measure("eager", {"a": subject}, 0.0)
    assert calls == [0, 1] * 3
    assert found["a"].p50 > 0


def test_random_bits_are_half_ones_in_every_place_and_leave_torchs_generator_alone():
    state = torch.get_rng_state()
    bits = timing.random_bits(400_000, torch.device("cpu"))
    assert bits.nbytes == 400_000
    for place in range(32):
        assert (bits >> place & 1).float().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("properties", "size"),
    [
        ({"L2_cache_size": 50 << 20}, 50 << 20),
        ({"L2_cache_size": 0}, 128 << 20),
        ({}, 128 << 20),
    ],
)
def test_the_l2_cache_is_the_devices_or_a_stated_large_one(monkeypatch, properties, size):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties)
    )
    assert timing.l2_bytes(torch.device("cuda")) == size


def test_a_cold_call_is_timed_alone_after_l2_was_overwritten_and_written_back(gpu):
    subject = Subject([lambda: gpu.work("call", 0.25)])
    found = gpu.timer().measure("cold", {"a": subject}, 0.0)
    assert found["a"].p50 == pytest.approx(250.0)
    assert gpu.log[:5] == ["busy", "write", "read", "call", "wait"]
    written, read = gpu.flushed[:2]
    assert written is not read
    assert min(written.size, read.size) > 2 * L2


def test_a_hot_call_finds_its_input_just_written(gpu):
    subject = Subject([lambda: gpu.work("call", 0.25)], produce=lambda: gpu.work("input", 3.0))
    found = gpu.timer().measure("hot", {"a": subject}, 0.0)
    assert found["a"].p50 == pytest.approx(250.0)
    assert gpu.log[:4] == ["busy", "input", "call", "wait"]


@pytest.mark.parametrize(("least", "wanted"), [(20, 21), (21, 21), (1, 3), (100, 102)])
def test_a_graph_holds_calls_over_all_buffers_equally_often_and_is_timed_per_call(
    gpu, least, wanted
):
    timer = gpu.timer()
    calls = [lambda index=index: gpu.work(f"call {index}", 0.1) for index in range(3)]
    found = timer.measure("graph", {"a": Subject(calls, least_calls=least)}, 0.0)
    assert found["a"].p50 == pytest.approx(100.0)
    graph, count = timer.capture(Subject(calls, least_calls=least))
    assert count == wanted
    assert [name for name, _ in graph.work] == ["call 0", "call 1", "call 2"] * (wanted // 3)
    assert timing.CALLS_IN_GRAPH == Subject([]).least_calls == 20


def test_what_cannot_be_captured_fails_alone(gpu):
    def refuse():
        if gpu.recorded is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    subjects = {"bad": Subject([refuse]), "good": Subject([lambda: gpu.work("call", 0.1)])}
    found = gpu.timer().measure("graph", subjects, 0.0)
    assert list(found) == ["good"]
    assert "not permitted" in str(subjects["bad"].failure)  # what broke it, not its end
    assert gpu.undone == [(0, (0, 7)), "graph", "fresh"]


def test_the_gpu_is_kept_busy_for_longer_for_the_subject_that_needs_it_and_for_good(gpu):
    def launched(name, milliseconds):
        def call():
            gpu.launching = milliseconds
            gpu.work(name, 0.25)

        return Subject([call])

    assert BUSY_CYCLES == 100_000  # 50 us at 2 GHz
    # The flush takes 0.1 ms of its own: 0.05 and 0.1 ms of keeping busy are too few for 0.25.
    subjects = {"slow": launched("slow", 0.25), "quick": launched("quick", 0.01)}
    found = gpu.timer().measure("cold", subjects, 0.0)
    assert gpu.log.count("slow") == ROUNDS + 2  # 50, 100, then 200 us from the first round on
    assert gpu.log.count("quick") == ROUNDS
    assert sorted(gpu.busied) == [BUSY_CYCLES] * (ROUNDS + 1) + [2 * BUSY_CYCLES] + (
        [4 * BUSY_CYCLES] * ROUNDS
    )
    assert found["slow"].p50 == pytest.approx(250.0)
    assert not subjects["slow"].late


def test_a_host_that_never_gets_ahead_is_marked_and_ends(gpu):
    timer = gpu.timer()
    gpu.launching = 1e6
    late, quick = Subject([lambda: gpu.work("call", 0.25)]), Subject([lambda: None])
    timer.measure("hot", {"late": late}, 0.0)
    assert gpu.log.count("call") == ROUNDS + 9  # 50 us doubled nine times, then no more
    assert max(gpu.busied) == timing.MOST_BUSY_CYCLES == 512 * BUSY_CYCLES
    assert late.late
    gpu.launching = 0.0
    timer.measure("hot", {"quick": quick}, 0.0)
    assert not quick.late


def test_gaps_of_the_host_count_from_an_idle_gpu_on(gpu):
    def call():
        gpu.now += 3.0  # the host prepares, the GPU waits
        gpu.work("call", 0.25)

    assert gpu.timer().with_gaps(call) == pytest.approx(3250.0)
    assert gpu.log == ["wait", "call", "wait"]  # kept busy by nothing


def test_host_time_does_not_wait_for_the_gpu(gpu):
    host = gpu.timer().host_us(Subject([lambda: gpu.work("call", 5.0)]))
    assert 0 < host < 1000
    first = gpu.log.index("call")
    assert "wait" not in gpu.log[first : first + timing.CALLS_IN_EAGER]


def test_eager_time_includes_the_completion(gpu):
    gpu.timer().measure("eager", {"a": Subject([lambda: gpu.work("call", 1.0)])}, 0.0)
    assert gpu.log[: timing.CALLS_IN_EAGER + 2] == [
        "wait",
        *["call"] * timing.CALLS_IN_EAGER,
        "wait",
    ]


@pytest.mark.parametrize("kind", ["cold", "graph", "eager"])
def test_an_error_that_costs_the_device_ends_the_timing_and_names_its_subject(gpu, kind):
    def fatal():
        gpu.work("fatal")
        gpu.lost = True
        raise RuntimeError("an illegal memory access")

    subjects = {name: Subject([lambda name=name: gpu.work(name, 0.1)]) for name in "ab"}
    subjects = {"a": subjects["a"], "fatal": Subject([fatal]), "b": subjects["b"]}
    with pytest.raises(
        LostDeviceError, match=r"lost in the work of fatal: Runtime.*illegal"
    ) as told:
        gpu.timer().measure(kind, subjects, 0.0)
    assert told.value.subject == "fatal"
    assert "b" not in gpu.log
    assert gpu.log.count("fatal") == 1
