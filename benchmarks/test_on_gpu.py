"""Runs on a GPU every provider and kind of timing, models in a graph, calibration; in 10 s."""

import math

import pytest
import torch

from adapterkern.backends import NAMES, get
from adapterkern.backends.base import allow_tf32
from adapterkern.bench import timing
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.measure import Settings, measure_case
from adapterkern.bench.providers import BASELINES, PROVIDERS
from benchmarks import model_level, models, tasks, triton_rates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPECS = {spec.name: spec.tiny() for spec in models.SPECS}


@pytest.fixture(scope="module")
def timer():
    return timing.timer_for(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture(scope="module")
def calibrated(timer):
    with timer.session():
        return triton_rates.measure(timer, 0.4)


@pytest.mark.parametrize("mode", ["forward", "backward", "step"])
def test_every_provider_is_timed_in_every_way(mode, timer, calibrated):
    fused = [name for name in NAMES if get(name).unavailable_reason() is None]
    # One compilation will do, and autotuning takes a minute.
    left_out = {"compile-max"} | ({"compile"} if mode != "forward" else set())
    names = [*fused, *(entry.name for entry in BASELINES if entry.name not in left_out)]
    case = BenchCase(256, 16, 64, "bf16", mode=mode)
    chosen = [PROVIDERS[name] for name in names]
    rows = measure_case(case, chosen, timer, calibrated, Settings(seconds=0.0, hot=True))
    for row in rows:
        assert row.status in ("ok", "unavailable"), f"{row.provider}: {row.note}"
        if row.status == "ok" and row.provider != "no-adapter":
            # nvmath may refuse to be captured, which its row then says.
            refused = {"graph"} if row.provider == "cublaslt" and "graph:" in row.note else set()
            assert set(row.timings) == set(timing.KINDS) - refused, f"{row.provider}: {row.note}"
            assert all(0 < found.p50 < 1e5 for found in row.timings.values())
            assert refused or 0 < row.floor_fraction < 1.1
            assert row.host_us > 0
            assert row.kernels is None or row.kernels >= 1  # None: this torch keeps no graph
            assert row.copy_fraction > 0
    ours = [row for row in rows if row.ours]
    assert {row.status for row in ours} == {"ok"}
    assert all(row.repeatable for row in ours)
    assert all("plain" in row.ratios for row in ours)


@pytest.mark.parametrize("execution", ["eager", "graph"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("block-1024", "step"),
        ("bert-base-32x128", "forward"),
        ("bert-base-32x128", "step"),
        ("gpt2-medium-1x128-H", "forward"),
        ("llama-7b-block-4x2048", "forward"),
        ("gpt2-medium-16x256-seq_bn", "decode"),
    ],
)
def test_a_model_is_timed_eagerly_and_captured_in_a_graph(name, mode, execution, timer):
    spec = SPECS[name]
    rows = model_level.measure_model(spec, mode, execution, timer, torch.bfloat16, 0.0)
    for row in rows:
        assert row.status in ("ok", "unavailable"), f"{row.variant}: {row.note}"
        if row.status == "ok":
            assert row.milliseconds.p50 > 0
            assert row.peak_bytes > 0
            assert (row.overhead_percent is None) == (row.variant == "plain")
    assert rows[0].status == "ok"


def test_the_calibration_is_complete_and_plausible(calibrated):
    values = calibrated.as_dict()
    values["copy_bandwidth_after"] = calibrated.copy_bandwidth
    values["matrix_rate_after"] = calibrated.matrix_rate
    missing = [name for name in calibrated.__dataclass_fields__ if name not in values]
    assert missing == []
    assert all(math.isfinite(value) and value > 0 for value in values.values())
    assert 1e10 < calibrated.copy_bandwidth < 2e13
    assert calibrated.l2_bandwidth > 0.5 * calibrated.copy_bandwidth
    assert 1e11 < calibrated.matrix_rate_fp32 <= 1.5 * calibrated.matrix_rate
    assert calibrated.graph_kernel < 1e-4


def test_tf32_is_faster_than_full_precision_where_it_is_allowed(timer):
    def rate():
        with timer.session():
            return tasks.calibration.matrix_rate(timer, 0.1, 4096, torch.float32)

    full = rate()
    with tasks._tf32():
        assert allow_tf32()
        assert rate() > 1.5 * full
    assert not allow_tf32()
