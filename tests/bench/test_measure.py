"""One case, all providers: the gate, the counts, and failures that cost one row."""

import sys
from dataclasses import replace

import pytest
import torch

from adapterkern import parity
from adapterkern.bench import gate, measure, memory, providers
from adapterkern.bench.built import UnavailableError
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.measure import Settings, measure_case
from adapterkern.bench.providers import Provider
from adapterkern.bench.results import Timing
from adapterkern.bench.timing import WallTimer

CASE = BenchCase(48, 8, 33, "fp32", "gelu", "step")
FAST = Settings(seconds=0.0)


def rows_of(*chosen, case=CASE):
    chosen = [providers.PROVIDERS.get(entry, entry) for entry in chosen]
    found = measure_case(case, chosen, WallTimer(), Calibration(), FAST)
    assert [row.provider for row in found] == [entry.name for entry in chosen]
    return found


def changed(name, change, base="plain"):
    """A provider like `base` whose result `change` alters."""

    def build(case, inputs):
        built = providers.PROVIDERS[base].build(case, inputs)
        return replace(built, forward=change(built.forward))

    return Provider(name, "for a test", build, ours=True)


def failing(name, error):
    def build(case, inputs):
        raise error

    return Provider(name, "for a test", build)


@pytest.mark.sweep
@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_providers_that_are_right_are_timed(mode, activation):
    case = replace(CASE, mode=mode, activation=activation)
    rows = rows_of("reference", "plain", "addmm", "limit", "no-adapter", case=case)
    for row in rows:
        assert row.status == "ok"
        assert row.time.p50 > 0
        assert row.time.samples >= 5
    for row in rows[:3]:
        assert 0 < row.error <= row.tolerance < 1e-5
    assert [row.repeatable for row in rows] == [True, None, None, None, None]


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_provider_with_a_wrong_result_gets_no_time(factor):
    wrong = changed("wrong", lambda forward: lambda x: forward(x) * factor)
    rows = rows_of(wrong, "plain")
    assert rows[0].status == "wrong"
    assert rows[0].timings == {}
    assert rows[0].time is None
    assert rows[0].note.startswith(("y: error", "d"))
    assert rows[1].status == "ok"
    assert rows[1].time.p50 > 0


def test_a_provider_with_a_wrong_gradient_gets_no_time():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.01

    wrong = changed("wrong", lambda forward: lambda x: Scaled.apply(forward(x)))
    (row,) = rows_of(wrong)
    assert (row.status, row.timings) == ("wrong", {})
    assert row.error == pytest.approx(0.01, rel=0.1)
    (forward_only,) = rows_of(wrong, case=replace(CASE, mode="forward"))
    assert forward_only.status == "ok"


def test_a_provider_with_other_weights_gets_no_time():
    def build(case, inputs):
        other = case.draw("cpu", seed=1)
        return providers.PROVIDERS["plain"].build(case, other)

    (row,) = rows_of(Provider("other", "for a test", build))
    assert (row.status, row.timings) == ("wrong", {})


def test_a_result_in_another_dtype_gets_no_time():
    widened = changed("widened", lambda forward: lambda x: forward(x).double())
    (row,) = rows_of(widened, case=replace(CASE, mode="forward"))
    assert row.status == "wrong"
    assert "float64" in row.note


def test_a_missing_package_is_said_in_its_row_and_the_run_goes_on(monkeypatch):
    for module in ("adapters", "adapters.methods.modeling", "peft.tuners.lora.layer"):
        monkeypatch.setitem(sys.modules, module, None)  # Python's own mark of a module to refuse
    monkeypatch.setitem(sys.modules, "nvmath.linalg.advanced", None)
    *missing, plain = rows_of("adapterhub", "lora", "cublaslt", "plain")
    for row, package in zip(missing, ("adapters", "peft", "nvmath-python"), strict=True):
        assert row.status == "unavailable"
        assert row.note.startswith(f"{package} cannot be imported (")
    assert (plain.status, plain.time.samples >= 5) == ("ok", True)


def test_lora_is_judged_by_its_own_formula():
    pytest.importorskip("peft", reason="peft is not installed")
    (row,) = rows_of("lora")
    assert row.status == "ok"
    assert row.error <= row.tolerance
    assert row.note == "no activation, no biases"


def test_adapterhub_is_timed_where_it_is_installed():
    pytest.importorskip("adapters", reason="adapters is not installed")
    (row,) = rows_of("adapterhub")
    assert (row.status, row.note) == ("ok", "")


def test_running_out_of_memory_is_recorded_and_the_run_goes_on():
    rows = rows_of(
        failing("greedy", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")),
        failing("cpu-greedy", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        "plain",
    )
    assert [row.status for row in rows] == ["out_of_memory", "out_of_memory", "ok"]
    assert "9 GiB" in rows[0].note
    assert rows[0].timings == {}


@pytest.mark.thorough
def test_inputs_that_do_not_fit_cost_one_case(monkeypatch):
    def draw(self, device, seed=0):
        raise torch.OutOfMemoryError("no room for x")

    monkeypatch.setattr(BenchCase, "draw", draw)
    rows = rows_of("reference", "plain")
    assert [(row.status, row.note) for row in rows] == [
        ("out_of_memory", "OutOfMemoryError: no room for x")
    ] * 2


def test_memory_that_runs_out_while_timing_costs_one_row():
    def out_of_memory_later(forward):
        calls = []

        def run(x):
            calls.append(None)
            if len(calls) > 3:
                raise torch.OutOfMemoryError("later")
            return forward(x)

        return run

    late = replace(changed("late", out_of_memory_later), ours=False)
    rows = rows_of(late, "plain", case=replace(CASE, mode="forward"))
    assert rows[0].timings == {}
    assert rows[0].status == "out_of_memory"
    assert rows[1].status == "ok"


@pytest.mark.parametrize(
    ("error", "status"),
    [(UnavailableError("not here"), "unavailable"), (ValueError("odd"), "failed")],
)
def test_an_error_names_its_row_only(error, status):
    rows = rows_of(failing("a", error), "plain")
    assert [row.status for row in rows] == [status, "ok"]


def test_a_fused_backend_without_a_gpu_is_unavailable_with_its_reason():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (row,) = rows_of("triton")
    assert (row.status, row.note) == ("unavailable", "no CUDA device")


def test_saved_bytes_are_those_beside_inputs_and_parameters():
    x = torch.randn(10, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    # x and weight are known; exp saves its result, [10, 6] of 4 bytes.
    assert memory.saved_bytes(lambda: torch.exp(x @ weight.T), [x, weight]) == 10 * 6 * 4
    ours, plain = rows_of("reference", "plain")
    assert ours.saved_bytes == 33 * 8 * 4  # z
    assert plain.saved_bytes == 2 * 33 * 8 * 4  # z and a


def test_ratios_and_fractions_come_of_the_headline_timing_on_a_gpu_only():
    case = BenchCase(1024, 64, 16384)
    rows = [
        measure.Row(case, name, ours=name == "triton", headline="cold")
        for name in ("triton", "plain", "limit", "no-adapter")
    ]
    for row, time in zip(rows, (20.0, 50.0, 18.0, 0.0), strict=True):
        row.timings = {"cold": Timing(time, time, time, 9), "graph": Timing(1.0, 1.0, 1.0, 9)}
    calibration = Calibration(copy_bandwidth=4.3e12, peak_bandwidth=4.8e12)
    measure._derive(rows, case, calibration, torch.device("cpu"))
    for row in rows:
        assert row.ratios == {}
        fractions = (row.copy_fraction, row.floor_fraction, row.peak_fraction)
        assert fractions == (None, None, None)
    measure._derive(rows, case, calibration, torch.device("cuda"))
    assert rows[0].ratios == {"plain": 2.5, "limit": 0.9}
    assert rows[1].ratios == {"triton": 0.4, "limit": 0.36}
    assert [row.copy_fraction for row in rows] == [0.9, 0.36, 1.0, None]
    # 67371008 bytes at 4.3 TB/s are 15.67 us, at 4.8 TB/s 14.04; the copy moves 67108864.
    assert rows[0].floor_fraction == pytest.approx(15.668 / 20, rel=1e-4)
    assert rows[0].peak_fraction == pytest.approx(14.036 / 20, rel=1e-4)
    assert rows[2].peak_fraction == pytest.approx(67108864 / 4.8e12 / 18e-6)
    assert rows[0].gb_per_s == pytest.approx(67371008 / 20e-6 / 1e9)


def test_a_copy_of_another_kind_of_timing_is_no_yardstick():
    case = BenchCase(1024, 64, 16384)
    rows = [measure.Row(case, name, headline="cold") for name in ("triton", "limit")]
    rows[0].timings = {"cold": Timing(20.0, 20.0, 20.0, 9)}
    rows[1].timings = {"graph": Timing(15.0, 15.0, 15.0, 9)}
    measure._derive(rows, case, Calibration(), torch.device("cuda"))
    assert rows[0].copy_fraction is None
    rows[1].timings["cold"] = Timing(16.0, 16.0, 16.0, 9)
    measure._derive(rows, case, Calibration(), torch.device("cuda"))
    assert rows[0].copy_fraction == 0.8


@pytest.mark.parametrize(
    ("headline", "buffers", "share"),
    [("graph", 30 * 2**20, None), ("graph", 60 * 2**20, 0.5), ("cold", None, 0.5)],
)
def test_a_copy_that_stays_in_l2_is_no_measure(headline, buffers, share):
    case = BenchCase(1024, 64, 16)
    rows = [measure.Row(case, name, headline=headline) for name in ("triton", "limit")]
    for row, time in zip(rows, (4.0, 2.0), strict=True):
        row.timings = {headline: Timing(time, time, time, 9)}
        row.buffer_bytes = buffers
    measure._derive(rows, case, Calibration(), torch.device("cuda"), 50 * 2**20)
    assert rows[0].copy_fraction == share


def test_nothing_is_a_fraction_of_an_unmeasured_copy():
    case = BenchCase(1024, 64, 16384)
    row = measure.Row(case, "triton", headline="cold")
    row.timings = {"cold": Timing(20.0, 20.0, 20.0, 9)}
    measure._derive([row], case, Calibration(matrix_rate=7e14), torch.device("cuda"))
    assert (row.floor_us, row.floor_fraction) == (None, None)
    assert row.gb_per_s == pytest.approx(67371008 / 20e-6 / 1e9)


@pytest.mark.parametrize(("mode", "passes"), [("forward", 2), ("backward", 3), ("step", 5)])
def test_a_limit_is_judged_by_the_bytes_that_it_moves(mode, passes):
    case = BenchCase(1024, 64, 16384, mode=mode)
    row = measure.Row(case, "limit", headline="cold")
    row.timings = {"cold": Timing(50.0, 50.0, 50.0, 9)}
    measure._derive([row], case, Calibration(copy_bandwidth=4e12), torch.device("cuda"))
    moved = passes * 16384 * 1024 * 2
    assert row.gb_per_s == pytest.approx(moved / 50e-6 / 1e9)
    assert row.floor_fraction == pytest.approx(moved / 4e12 / 50e-6)


@pytest.mark.thorough
def test_compile_is_judged_and_timed_like_the_others():
    case = BenchCase(16, 4, 8, "fp32", "relu", "forward")
    (row,) = rows_of("compile", case=case)
    assert row.status in ("ok", "failed")  # failed: no C++ compiler here
    if row.status == "ok":
        assert row.note.startswith("compiled in")
        assert row.error <= row.tolerance


def test_unknown_providers_are_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"unknown baseline or backend 'torch'(.|\n)*adapterhub"):
        providers.providers(["plain", "torch"])


def truncating(forward):
    """A tensor core's TF32: the factors of every product without their low bits."""

    class Truncated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with parity.TruncatedProducts():
                return forward.double()(x.double()).float()

    return lambda x: Truncated.apply(x)


def test_tf32_may_drop_the_low_bits_where_torch_allows_it():
    exact = changed("tf32", truncating)
    case = replace(CASE, mode="forward")
    (row,) = rows_of(exact, case=case)
    assert (row.status, row.error > 50 * row.tolerance) == ("wrong", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        (row,) = rows_of(exact, case=case)
        worse = changed("worse", lambda forward: lambda x: truncating(forward)(x) * 1.01)
        (spoilt,) = rows_of(worse, case=case)
    finally:
        torch.set_float32_matmul_precision(before)
    assert row.status == "ok"
    assert row.error == pytest.approx(row.tolerance / parity.FORWARD_ALLOWANCE, rel=0.01)
    assert spoilt.status == "wrong"


def test_bits_that_differ_in_one_run_of_ten_are_seen():
    runs = iter(range(gate.RUNS))
    assert gate.repeats(lambda: {"y": torch.ones(3)})
    assert not gate.repeats(lambda: {"y": torch.full((3,), float(next(runs) == 7))})
