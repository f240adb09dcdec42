"""The requests that the measuring worker serves: each gives records of what it measured."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapterkern.backends import NAMES, get
from adapterkern.bench import calibration, environment
from adapterkern.bench.calibration import Calibration, from_dict
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.measure import Settings, measure_case
from adapterkern.bench.providers import PROVIDERS
from adapterkern.bench.results import LostDeviceError, ModelRow, Row
from adapterkern.bench.timing import CudaTimer, WallTimer, timer_for
from adapterkern.testing import lost_device
from benchmarks import model_level, models, triton_rates
from benchmarks.judge import TF32, TF32_RATE

__all__ = ["Bench", "LostDeviceError", "fused_backends", "lost_device", "run"]

ROOT = Path(__file__).parents[1]
SPECS = {spec.name: spec for spec in models.SPECS}
Records = Iterator[tuple[str, dict[str, Any]]]


@dataclass
class Bench:
    """The state that tasks share. seconds: time to sample each kind of timing; tiny: take sizes of
    a few units, which show that it works and measure nothing.
    """

    timer: WallTimer | CudaTimer
    backends: list[str]
    seconds: float = 0.25
    tiny: bool = False

    @classmethod
    def here(cls, tiny: bool = False) -> "Bench":
        """Use this machine's GPU; the CPU where there is none, or with `tiny`."""
        on_gpu = torch.cuda.is_available() and not tiny
        timer = timer_for(torch.device("cuda" if on_gpu else "cpu"))
        return cls(timer, fused_backends(on_gpu), 0.01 if tiny else 0.25, tiny)

    @property
    def device(self) -> torch.device:
        return self.timer.device if isinstance(self.timer, CudaTimer) else torch.device("cpu")


def fused_backends(on_gpu: bool) -> list[str]:
    """Name the kernels that can run here, in the order of "auto", else the reference."""
    able = [name for name in NAMES if get(name).unavailable_reason() is None]
    fused = [name for name in able if name != "reference"]
    return fused if on_gpu and fused else ["reference"]


def run(bench: Bench, request: dict[str, Any]) -> Records:
    """Return the records of a request.

    Raises:
        LostDeviceError: the GPU answers nothing any more in this process.
        RuntimeError: nothing could be measured, with the reason.
    """
    work = {
        "calibrate": _calibrate,
        "calibrate again": _calibrate_again,
        "adapter": _adapter,
        "model": _model,
        "host": _host,
    }
    return work[request["do"]](bench, request)


def _adapter(bench: Bench, request: dict[str, Any]) -> Records:
    case = BenchCase(**request["case"])
    if bench.tiny:
        few = {"hidden_size": 32, "bottleneck_size": 4, "tokens": 8, "dtype": "fp32"}
        case = replace(case, **few, adapters=min(2, case.adapters))
    names = request.get("backends")
    names = [*(bench.backends if names is None else names), *request["baselines"]]
    tf32 = bool(request.get("tf32"))
    measured = from_dict(request["calibration"])
    settings = Settings(seconds=bench.seconds, hot=bool(request.get("hot")))
    with allowing_tf32() if tf32 else contextlib.nullcontext():
        if tf32 and isinstance(bench.timer, CudaTimer):
            measured = _with_tf32_rate(measured, bench.timer)
            values = {**request["calibration"], TF32_RATE: measured.matrix_rate_fp32}
            yield "calibration", {"values": values}
        chosen = [PROVIDERS[name] for name in names]
        lost: LostDeviceError | None = None
        try:
            rows = measure_case(case, chosen, bench.timer, measured, settings)
        except LostDeviceError as error:
            rows, lost = error.rows, error
    if tf32:
        _remark(rows, TF32)
    if lost is not None:
        yield from (_record(row) for row in rows)
        raise lost
    yield from _rows(rows)


@contextlib.contextmanager
def allowing_tf32() -> Iterator[None]:
    """Let float32 products use TF32, torch's and the kernels', which follow the same setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _with_tf32_rate(measured: Calibration, timer: CudaTimer) -> Calibration:
    """Return the calibration with float32's rate as it is now."""
    with timer.session():
        rate = calibration.matrix_rate(timer, 0.2, calibration.FLOAT32_SIZE, torch.float32)
    return replace(measured, matrix_rate_fp32=rate)


def _remark(rows: Iterable[Row | ModelRow], text: str) -> None:
    for row in rows:
        row.note = "; ".join(filter(None, [row.note, text]))


def _model(bench: Bench, request: dict[str, Any]) -> Records:
    spec = SPECS[request["spec"]]
    on_gpu = isinstance(bench.timer, CudaTimer)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = model_level.measure_model(
        spec if on_gpu else spec.tiny(),
        request["mode"],
        request["execution"] if on_gpu else "eager",
        bench.timer,
        dtype,
        bench.seconds,
    )
    if not on_gpu:
        _remark(rows, "widths of a few units, to see it run")
    yield from _rows(rows)


def _rows(rows: Sequence[Row | ModelRow]) -> Records:
    """Return the records of rows.

    Raises:
        RuntimeError: after them, where no implementation that can run has a time.
    """
    yield from map(_record, rows)
    limits = ("no-adapter", "limit")
    own = [row for row in rows if isinstance(row, ModelRow) or row.provider not in limits]
    broken = [row for row in own if row.status not in ("ok", "unavailable")]
    if broken and not any(row.timed for row in own):
        raise RuntimeError(f"nothing was timed: {broken[0].note}")


def _record(row: Row | ModelRow) -> tuple[str, dict[str, Any]]:
    return ("row" if isinstance(row, Row) else "model"), {"content": asdict(row)}


def _calibrate(bench: Bench, _request: dict[str, Any]) -> Records:
    timer = bench.timer
    if not isinstance(timer, CudaTimer):
        yield "calibration", {"values": {}, "clocks": None}
        return
    with timer.session():
        calibration.copy_bandwidth(timer, 0.2)  # idle clocks would say nothing of the run
        clocks = environment.clocks(timer.device)
        measured = triton_rates.measure(timer, 2.0)
    yield "calibration", {"values": measured.as_dict(), "clocks": clocks}


def _calibrate_again(bench: Bench, request: dict[str, Any]) -> Records:
    """Measure the copy and the product once more, which tell a steady run."""
    timer, measured = bench.timer, from_dict(request["calibration"])
    if not isinstance(timer, CudaTimer):
        return
    with timer.session():
        measured = calibration.measure_after(timer, measured)
    values = {**request["calibration"], **measured.as_dict()}
    yield "calibration", {"values": values, "clocks": environment.clocks(timer.device)}


def _host(bench: Bench, _request: dict[str, Any]) -> Records:
    """Run the host-overhead suite in a process of its own; its numbers are in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "host.json")
        command = [sys.executable, "-m", "pytest", "benchmarks/test_host_overhead.py", "-q"]
        command += ["-p", "no:cacheprovider", f"--benchmark-json={output}"]
        command += ["--benchmark-max-time=0.05", "--benchmark-min-rounds=20"]
        command += ["-k", "function"] if bench.tiny else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if not output.exists() or not output.read_text():
            says = (done.stdout + done.stderr).strip()[-300:]
            raise RuntimeError(f"the host-overhead suite failed: {says}")
        data = json.loads(output.read_text())
    for entry in data["benchmarks"]:
        stats = entry["stats"]
        content = {
            "name": entry["name"],
            "median_us": round(stats["median"] * 1e6, 3),
            "iqr_us": round(stats["iqr"] * 1e6, 3),
            "rounds": stats["rounds"],
        }
        yield "host", {"content": content}
