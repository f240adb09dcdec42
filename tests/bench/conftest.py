"""A made-up result of a GPU that nobody measured, for what only reads results."""

import pytest

from adapterkern.bench import roofline
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.results import ModelRow, Result, Row, Timing

COPY = 4.0e12  # of the made-up GPU, bytes a second
SHARE = {"triton": 0.8, "plain": 0.32, "adapterhub": 0.23, "compile": 0.4}  # of that, reached


def timing(microseconds, spread=0.01, samples=50):
    low, high = microseconds * (1 - spread), microseconds * (1 + spread)
    return Timing(low, microseconds, high, samples)


def gpu_row(case, provider, machine):
    floor = roofline.moved_bytes(case) / machine.copy_bandwidth * 1e6
    time = floor / SHARE[provider]
    return Row(
        case,
        provider,
        ours=provider == "triton",
        headline="cold",
        timings={"cold": timing(time), "hot": timing(time * 0.9)},
        gb_per_s=roofline.moved_bytes(case) / time / 1e3,
        floor_us=roofline.seconds(case, machine) * 1e6,
        floor_fraction=SHARE[provider],
        copy_fraction=SHARE[provider] / 0.98,
        peak_fraction=SHARE[provider] * 0.9,
        ratios={name: SHARE[provider] / SHARE[name] for name in SHARE if name != provider},
        host_us=12.0,
        peak_bytes=2**25,
        transient_bytes=0,
        saved_bytes=None if case.mode == "forward" else case.tokens * case.bottleneck_size * 2,
        kernels=1,
        error=1e-3,
        tolerance=4e-3,
        repeatable=True if provider == "triton" else None,
    )


@pytest.fixture
def gpu_result():
    """Three numbers of tokens, two shapes, forward and step, four providers, one model."""
    header = {
        "created": "2026-01-02T03:04:05+00:00",
        "device": "Made-up GPU",
        "device_type": "cuda",
        "commit": "0123456789abcdef",
        "dirty": False,
        "driver": "1.2.3",
        "versions": {"adapterkern": "0.1.0", "torch": "2.9.0", "triton": "3.5.0"},
        "calibration": {
            "copy_bandwidth": COPY,
            "matrix_rate": 700e12,
            "graph_kernel": 2e-6,
            "copy_bandwidth_after": 0.99 * COPY,
            "matrix_rate_after": 699e12,
        },
        "finished": True,
        "stages": ["verify", "report"],
    }
    machine = roofline.Machine(COPY, 700e12, 2e-6)
    cases = [
        BenchCase(hidden, bottleneck, tokens, mode=mode)
        for hidden, bottleneck in ((768, 48), (1024, 64))
        for mode in ("forward", "step")
        for tokens in (4096, 16384, 65536)
    ]
    rows = [gpu_row(case, name, machine) for case in cases for name in SHARE]
    models = [
        ModelRow("block-1024", name, mode, "graph", milliseconds=timing(ms), overhead_percent=over)
        for name, ms, over in (("plain", 0.8, None), ("adapterkern", 0.84, 5.0))
        for mode in ("forward", "step")
    ]
    return Result(header, rows, models, log=[{"task": "a", "status": "done", "seconds": 1.0}])
