"""The work of a report in order of worth: each task is small, named, and adds rows."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapterkern.bench.calibration import Calibration, from_dict
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.measure import Settings, measure_case
from adapterkern.bench.providers import BASELINES, PROVIDERS, Provider
from adapterkern.bench.results import ModelRow, Result, Row
from adapterkern.bench.timing import CudaTimer, WallTimer
from benchmarks import calibration, model_level, models
from benchmarks.preflight import ROOT

# (H, R) after the first: other models' widths, a wide bottleneck, and the largest.
SHAPES = ((768, 48), (4096, 64), (8192, 128), (4096, 256))
# No launch configuration is searched on these; a gap to the others would show an overfit.
HELD_OUT = (
    BenchCase(1280, 24, 4097, "bf16", "gelu"),
    BenchCase(2560, 96, 30011, "bf16", "relu"),
    BenchCase(5120, 384, 1000, "bf16", "silu"),
    BenchCase(1280, 48, 30011, "fp16", "gelu"),
    BenchCase(3072, 64, 16384, "fp32", "gelu"),
)


@dataclass
class Bench:
    """What tasks share. tiny: sizes for a test of the report itself."""

    timer: WallTimer | CudaTimer
    backends: list[str]
    seconds: float = 0.3
    tiny: bool = False

    @property
    def on_gpu(self) -> bool:
        return isinstance(self.timer, CudaTimer)


@dataclass(frozen=True)
class Task:
    """One step of a report. seconds: about how long, so that none begins that cannot end."""

    name: str
    seconds: float
    run: Callable[[Result, Bench], None]


def tasks(bench: Bench) -> list[Task]:
    """All tasks of this machine, the most telling first."""
    if bench.tiny:
        cases = [BenchCase(32, 4, 8, "fp32", mode=mode) for mode in ("forward", "step")]
        return [
            *(_adapter(case, ["plain", "addmm"], 0.5) for case in cases),
            _model(models.SPECS[0], "forward", "eager", 1),
            _model(models.SPECS[0], "step", "eager", 1),
            Task("host", 10, _host),
        ]
    return _gpu_tasks() if bench.on_gpu else _cpu_tasks()


def _cpu_tasks() -> list[Task]:
    sizes = ((768, 48, 128), (1024, 64, 128), (768, 48, 512))
    cases = [BenchCase(*size, "fp32", mode=mode) for size in sizes for mode in ("forward", "step")]
    small = (models.SPECS[0], next(spec for spec in models.SPECS if spec.family == "bert"))
    return [
        *(_adapter(case, ["plain"], 2) for case in cases),
        *(_model(spec, mode, "eager", 4) for spec in small for mode in spec.modes),
        Task("host", 15, _host),
    ]


def _gpu_tasks() -> list[Task]:
    quick = [entry.name for entry in BASELINES if not entry.compiled]
    everything = [entry.name for entry in BASELINES]
    blocks = [spec for spec in models.SPECS if spec.family == "block"]
    gpt2 = [spec for spec in models.SPECS if spec.family == "gpt2"]
    rest = [spec for spec in models.SPECS if spec.family in ("bert", "llama")]
    modes = ("forward", "step", "backward")
    first = [BenchCase(1024, 64, t, mode=mode) for t in (16384, 2048, 16) for mode in modes]
    wide = [BenchCase(h, r, 16384, mode=mode) for h, r in SHAPES for mode in modes]
    long = [
        BenchCase(h, r, 65536, mode=mode) for h, r in ((1024, 64), (4096, 64)) for mode in modes
    ]
    small = [BenchCase(h, r, t, mode="forward") for h, r in SHAPES[:3] for t in (1, 128, 2048)]
    compiled = [
        BenchCase(1024, 64, t, mode=mode) for t in (16384, 2048) for mode in ("forward", "step")
    ]
    half = [BenchCase(1024, 64, 16384, "fp16"), BenchCase(1024, 64, 16384, "fp32")]
    return [
        Task("calibration", 8, _calibrate),
        *(_adapter(case, quick, 7) for case in first),
        *(
            _model(blocks[0], mode, how, 8)
            for mode in blocks[0].modes
            for how in ("graph", "eager")
        ),
        *(_adapter(case, quick, 8) for case in wide),
        *(_model(spec, "forward", how, 10) for spec in gpt2 for how in ("eager", "graph")),
        *(
            _adapter(case, everything, 45 if case.mode == "forward" else 90, "compiled")
            for case in compiled
        ),
        *(_model(spec, mode, "eager", 10) for spec in rest for mode in spec.modes),
        *(_adapter(case, quick, 8) for case in (*small, *half, *HELD_OUT)),
        *(_adapter(case, quick, 10) for case in long),
        *(
            _model(blocks[1], mode, how, 10)
            for mode in blocks[1].modes
            for how in ("graph", "eager")
        ),
        *(_model(blocks[0], mode, "compile", 60) for mode in blocks[0].modes),
        Task("host", 20, _host),
        *(_model(gpt2[0], "step", how, 20) for how in ("eager", "graph")),
        *(_model(spec, mode, "graph", 10) for spec in rest for mode in spec.modes),
        *(_model(spec, mode, "compile", 90) for spec in (*rest, gpt2[0]) for mode in spec.modes),
    ]


def _adapter(
    case: BenchCase, baselines: list[str], seconds: float, prefix: str = "adapter"
) -> Task:
    def run(result: Result, bench: Bench) -> None:
        chosen: list[Provider] = [PROVIDERS[name] for name in (*bench.backends, *baselines)]
        settings = Settings(seconds=bench.seconds)
        measured = from_dict(result.header["calibration"])
        new = measure_case(case, chosen, bench.timer, measured, settings)
        result.rows = replaced(result.rows, new)

    return Task(f"{prefix} {case}", seconds, run)


def _model(spec: models.Spec, mode: str, execution: str, seconds: float) -> Task:
    def run(result: Result, bench: Bench) -> None:
        small = not bench.on_gpu  # widths of a few units: that every variant runs
        dtype = torch.bfloat16 if bench.on_gpu else torch.float32
        new = model_level.measure_model(
            spec.tiny() if small else spec, mode, execution, bench.timer, dtype, bench.seconds
        )
        if small:
            for row in new:
                row.note = "; ".join(
                    filter(None, [row.note, "widths of a few units, to see it run"])
                )
        result.models = replaced(result.models, new)

    return Task(f"model {spec.name} {mode} {execution}", seconds, run)


def replaced(old: list[Any], new: Iterable[Row | ModelRow]) -> list[Any]:
    """Rows with those of the same key replaced by the new ones, which come last."""
    new = list(new)
    keys = {row.key for row in new}
    return [*(row for row in old if row.key not in keys), *new]


def _calibrate(result: Result, bench: Bench) -> None:
    assert isinstance(bench.timer, CudaTimer)
    with bench.timer.session():
        measured: Calibration = calibration.measure(bench.timer, 2.0)
    result.header["calibration"] = measured.as_dict()


def _host(result: Result, bench: Bench) -> None:
    """The host-overhead suite in a process of its own; its numbers in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "host.json")
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
        command += ["--benchmark-max-time=0.05", "--benchmark-min-rounds=20"]
        command += [f"--benchmark-json={output}"] + (["-k", "function"] if bench.tiny else [])
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if not output.exists() or not output.read_text():
            raise RuntimeError(f"the host-overhead suite failed: {done.stdout.strip()[-300:]}")
        data = json.loads(output.read_text())
    result.host = [
        {
            "name": entry["name"],
            "median_us": round(entry["stats"]["median"] * 1e6, 3),
            "iqr_us": round(entry["stats"]["iqr"] * 1e6, 3),
            "rounds": entry["stats"]["rounds"],
        }
        for entry in data["benchmarks"]
    ]
