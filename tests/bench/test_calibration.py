"""Calibration on a timer of known answers, and a header's facts about a machine."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adapterkern.backends.triton import tuned
from adapterkern.bench import calibration, environment
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.results import LostDeviceError, Timing
from adapterkern.bench.roofline import Machine
from benchmarks import triton_rates


class Known:
    """Takes 1 ms for every call, 7 us of host time."""

    device = torch.device("cpu")

    def measure(self, kind, subjects, seconds):
        self.kind = kind
        (self.subject,) = subjects.values()
        self.result = self.subject.calls[0]()
        return {name: Timing(900.0, 1000.0, 1100.0, 9) for name in subjects}

    def host_us(self, subject):
        return 7.0


def test_rates_are_work_over_time(monkeypatch):
    monkeypatch.setattr(calibration, "COPY_BYTES", 1 << 20)
    timer = Known()
    assert calibration.copy_bandwidth(timer, 0.1) == pytest.approx((1 << 20) / 1e-3)
    assert timer.kind == "cold"
    ones = sum((timer.result >> place & 1).float().mean() for place in range(32)) / 32
    assert ones == pytest.approx(0.5, abs=0.01)  # random bits were copied
    assert calibration.matrix_rate(timer, 0.1, size=16) == pytest.approx(2 * 16**3 / 1e-3)
    assert timer.kind == "cold"
    assert calibration.graph_kernel(timer, 0.1) == pytest.approx(1e-3)
    assert (timer.kind, timer.subject.least_calls) == ("graph", 512)
    assert calibration.eager_launch(timer) == pytest.approx(7e-6)


def test_a_failure_is_not_taken_for_a_number():
    class Broken(Known):
        def measure(self, kind, subjects, seconds):
            for subject in subjects.values():
                subject.failure = RuntimeError("no graph here")
            return {}

    with pytest.raises(RuntimeError, match="no graph here"):
        calibration.graph_kernel(Broken(), 0.1)


def test_a_machine_is_what_was_measured_and_nothing_else():
    assert Calibration(matrix_rate=700e12, graph_kernel=2e-6).machine("bf16") is None
    assert Calibration(copy_bandwidth=3e12).machine("bf16") == Machine(3e12, None, 0.0)
    measured = Calibration(3e12, 700e12, 50e12, 1.5e-6)
    rates = {dtype: measured.machine(dtype).matrix_rate for dtype in ("bf16", "fp16", "fp32")}
    assert rates == {"bf16": 700e12, "fp16": 700e12, "fp32": 50e12}
    assert measured.machine("fp64") == Machine(3e12, None, 1.5e-6)


def test_every_dtype_of_products_is_measured_in_its_own_arithmetic(monkeypatch):
    asked = []

    def rate(timer, seconds, size=8192, dtype=torch.bfloat16):
        asked.append((size, dtype))
        return {torch.bfloat16: 700e12, torch.float32: 50e12}[dtype]

    monkeypatch.setattr(calibration, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(calibration, "matrix_rate", rate)
    found = calibration.measure(Known())
    assert (found.matrix_rate, found.matrix_rate_fp32) == (700e12, 50e12)
    assert asked == [(8192, torch.bfloat16), (4096, torch.float32)]


@pytest.mark.parametrize(
    ("copy", "matrix", "steady"),
    [
        (4.0e12, 700e12, True),
        (3.9e12, 690e12, True),
        (3.8e12, 700e12, False),
        (4.0e12, 670e12, False),
        (4.0e12, 730e12, False),
        (3.8e12, None, False),
        (None, 700e12, None),
        (4.0e12, None, None),
        (None, None, None),
    ],
)
def test_a_run_is_steady_while_both_copy_and_product_keep_their_rates(copy, matrix, steady):
    measured = Calibration(copy_bandwidth=4.0e12, matrix_rate=700e12)
    after = replace(measured, copy_bandwidth_after=copy, matrix_rate_after=matrix)
    assert after.steady is steady
    assert measured.steady is None


def test_what_follows_a_run_is_the_copy_and_the_product_again(monkeypatch):
    monkeypatch.setattr(calibration, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(calibration, "matrix_rate", lambda timer, seconds: 690e12)
    before = Calibration(copy_bandwidth=1e9, matrix_rate=700e12, peak_bandwidth=2e9)
    found = calibration.measure_after(Known(), before)
    assert found.copy_bandwidth_after == pytest.approx((1 << 20) / 1e-3)
    wanted = replace(
        before, copy_bandwidth_after=found.copy_bandwidth_after, matrix_rate_after=690e12
    )
    assert found == wanted
    assert found.moves == pytest.approx(
        {"copy bandwidth": 0.0486, "matrix rate": -0.0143}, rel=0.01
    )


def test_l2_is_read_in_a_graph_from_random_bits(monkeypatch):
    given = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda source, sums, blocks, *_, **__: given.append((grid, source, blocks))

    monkeypatch.setattr(triton_rates, "_kernels", lambda: (Kernel(), None))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    timer = Known()
    rate = triton_rates.l2_bandwidth(timer, 0.1)
    assert timer.kind == "graph"
    ((grid, source, blocks),) = given
    assert (grid, source.nbytes, blocks) == ((528,), 16 << 20, 1024)
    # 1024 blocks of 16 KiB on 528 programs: two each, 32 times, in the millisecond of `Known`.
    assert rate == pytest.approx(528 * 2 * 32 * 4096 * 4 / 1e-3)
    bits = source.view(torch.int32)
    assert (bits & 1).float().mean() == pytest.approx(0.5, abs=0.01)


def test_triton_that_fails_leaves_the_rest_of_a_calibration_but_a_lost_gpu_does_not(monkeypatch):
    base = Calibration(copy_bandwidth=3e12)
    monkeypatch.setattr(triton_rates.calibration, "measure", lambda timer, seconds: base)

    def failing(error):
        def fail(timer, seconds):
            raise error

        return fail

    monkeypatch.setattr(triton_rates, "l2_bandwidth", failing(RuntimeError("no compiler")))
    assert triton_rates.measure(Known(), 1.0) == base
    monkeypatch.setattr(triton_rates, "l2_bandwidth", failing(LostDeviceError("gone")))
    with pytest.raises(LostDeviceError, match="gone"):
        triton_rates.measure(Known(), 1.0)


def test_a_calibration_comes_back_from_a_header():
    measured = Calibration(copy_bandwidth=4e12, l2_bandwidth=6e12)
    assert calibration.from_dict(measured.as_dict()) == measured
    assert calibration.from_dict({"copy_bandwidth": 4e12, "of a later version": 1}) == Calibration(
        copy_bandwidth=4e12
    )


def test_what_is_known_of_a_gpu_comes_from_its_driver_and_its_tuned_files(monkeypatch, tmp_path):
    asked = []

    def answer(command):
        asked.append(command)
        return "550.1" if "driver_version" in command[2] else "1980, 2619, 312.5, [N/A]"

    properties = SimpleNamespace(
        name="H200", major=9, minor=0, uuid="ab-cd", multi_processor_count=132, total_memory=1,
        L2_cache_size=2, shared_memory_per_block_optin=232448,
    )  # fmt: skip
    monkeypatch.setattr(tuned, "FOLDERS", (tmp_path,))
    tuned.save(tmp_path / "h200.json", "H200", tuned.Device(132, 232448), [])
    tuned.save(tmp_path / "a100.json", "A100", tuned.Device(108, 166912), [])
    monkeypatch.setattr(environment, "_output", answer)
    monkeypatch.setattr(environment, "peak_bandwidth", lambda _device: 3.35e12)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    gpu = torch.device("cuda")
    assert environment.clocks(gpu) == {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 312.5}
    assert asked[0][:2] == ["nvidia-smi", "--id=GPU-ab-cd"]
    facts = environment._gpu_facts(gpu)
    assert (facts["capability"], facts["driver"], facts["num_sms"]) == ("9.0", "550.1", 132)
    assert facts["peak_bandwidth"] == 3.35e12
    assert facts["tuned"] == [str(tmp_path / "h200.json")]
    monkeypatch.setattr(environment, "_output", lambda _command: None)
    assert environment.clocks(gpu) is None


def test_a_header_of_a_cpu_has_no_clocks():
    header = environment.header(torch.device("cpu"), "adapterkern bench")
    assert header["device_type"] == "cpu"
    assert header["clocks_before"] is None
    assert header["cpu"] == environment.cpu_model()
    assert header["versions"]["torch"] == torch.__version__
    assert header["command"] == "adapterkern bench"
