"""The work of a report in order of worth: each task is small, named, and adds rows."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapterkern.bench import calibration as package
from adapterkern.bench import environment
from adapterkern.bench.calibration import Calibration, from_dict
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.measure import Settings, measure_case
from adapterkern.bench.providers import BASELINES, PROVIDERS, Provider
from adapterkern.bench.results import ModelRow, Result, Row
from adapterkern.bench.timing import CudaTimer, WallTimer
from benchmarks import calibration, model_level, models
from benchmarks.judge import TF32, TF32_RATE
from benchmarks.preflight import ROOT

# No launch configuration is searched on these; a gap to the others would show an overfit.
HELD_OUT = (
    BenchCase(1280, 24, 4097, "bf16", "gelu"),
    BenchCase(2560, 96, 30011, "bf16", "relu"),
    BenchCase(5120, 384, 1000, "bf16", "silu"),
    BenchCase(1280, 48, 30011, "fp16", "gelu"),
    BenchCase(3072, 64, 16384, "fp32", "gelu"),
)
Rows = Sequence[Row | ModelRow]


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
    """One step of a report. seconds: about how long, so that none begins that cannot end.

    run: adds to the result, and returns the rows that it added.
    """

    name: str
    seconds: float
    run: Callable[[Result, Bench], Rows]


def tasks(bench: Bench) -> list[Task]:
    """All tasks of this machine, the most telling first."""
    if bench.tiny:
        cases = [BenchCase(32, 4, 8, "fp32", mode=mode) for mode in ("forward", "step")]
        return [
            *(_adapter(case, ["plain", "addmm"], 0.5) for case in cases),
            _model(models.SPECS[0], "forward", "eager", 1),
            _model(models.SPECS[0], "step", "eager", 1),
            _model(_SPEC["gpt2-medium-16x256-seq_bn"], "decode", "eager", 1),
            Task("host", 10, _host),
        ]
    return _gpu_tasks() if bench.on_gpu else _cpu_tasks()


_SPEC = {spec.name: spec for spec in (*models.SPECS, *models.PRESET_SPECS)}


def _cpu_tasks() -> list[Task]:
    sizes = ((768, 48, 128), (1024, 64, 128), (768, 48, 512))
    cases = [BenchCase(*size, "fp32", mode=mode) for size in sizes for mode in ("forward", "step")]
    small = (_SPEC["block-1024"], _SPEC["bert-base-32x128"], _SPEC["gpt2-medium-16x256-seq_bn"])
    return [
        *(_adapter(case, ["plain"], 2) for case in cases),
        *(_model(spec, mode, "eager", 4) for spec in small for mode in spec.modes),
        Task("host", 15, _host),
    ]


def _gpu_tasks() -> list[Task]:
    """Every goal within the first nine minutes, then more shapes, models and compiled runs."""
    quick = [entry.name for entry in BASELINES if not entry.compiled]
    first: dict[str, Task] = {}
    for task in (*_first_gpu_tasks(quick), *_more_adapters(quick), *_more_models()):
        first.setdefault(task.name, task)
    return list(first.values())


def _case(hidden: int, bottleneck: int, tokens: int, mode: str, dtype: str = "bf16") -> BenchCase:
    return BenchCase(hidden, bottleneck, tokens, dtype, mode=mode)


def _first_gpu_tasks(quick: list[str]) -> list[Task]:
    compiled = [*quick, "compile"]
    table_1 = [spec for spec in models.SPECS if spec.family == "gpt2"]
    return [
        Task("calibration", 8, _calibrate),
        _adapter(_case(1024, 64, 16384, "forward"), compiled, 25),
        _adapter(_case(1024, 64, 16384, "backward"), quick, 8),
        _adapter(_case(1024, 64, 16384, "step"), compiled, 40),
        *(_model(_SPEC["block-1024"], mode, "graph", 8) for mode in ("forward", "step")),
        _model(_SPEC["block-4096"], "forward", "graph", 8),
        *(_adapter(_case(hidden, 64, 16, "forward"), quick, 6) for hidden in (1024, 4096)),
        _adapter(_case(1024, 64, 2048, "forward"), quick, 8),
        _adapter(_case(4096, 64, 16384, "forward"), compiled, 25),
        _adapter(_case(8192, 128, 16384, "forward"), quick, 8),
        _adapter(_case(4096, 256, 16384, "forward"), quick, 8),
        _adapter(_case(4096, 64, 16384, "backward"), quick, 9),
        _adapter(_case(1024, 64, 65536, "backward"), quick, 10),
        _adapter(_case(8192, 128, 16384, "backward"), quick, 10),
        _adapter(_case(1024, 64, 4096, "backward"), quick, 7),
        _adapter(_case(1024, 64, 16384, "forward", "fp16"), quick, 6),
        _adapter(_case(1024, 64, 16384, "forward", "fp32"), quick, 6, tf32=True),
        Task("host", 20, _host),
        *(_model(spec, "forward", "graph", 7) for spec in table_1),
        _model(_SPEC["bert-base-32x128"], "forward", "eager", 7),
        _model(_SPEC["llama-7b-block-4x2048"], "forward", "eager", 7),
        _model(_SPEC["bert-base-32x128-seq_bn"], "forward", "eager", 7),
        _model(_SPEC["gpt2-medium-16x256-seq_bn"], "decode", "eager", 8),
        _adapter(HELD_OUT[-1], quick, 8),  # float32 in full precision
    ]  # fmt: skip


def _more_adapters(quick: list[str]) -> list[Task]:
    modes = ("forward", "step", "backward")
    shapes = ((768, 48), (8192, 128), (4096, 256))
    middle = [_case(1024, 64, 2048, mode) for mode in modes]
    wide = [_case(*shape, 16384, mode) for shape in shapes for mode in modes]
    few = [_case(*shape, t, "forward") for shape in ((768, 48), (4096, 64)) for t in (1, 128, 2048)]
    long = [_case(h, 64, 65536, mode) for h in (1024, 4096) for mode in modes]
    everything = [entry.name for entry in BASELINES]
    return [
        _adapter(_case(4096, 64, 16384, "step"), [*quick, "compile"], 40),
        *(_model(_SPEC["bert-base-32x128"], mode, "eager", 8) for mode in ("forward", "step")),
        *(_adapter(case, quick, 8) for case in (*middle, *wide)),
        *(_model(spec, mode, "eager", 8) for spec in models.PRESET_SPECS for mode in spec.modes),
        *(_adapter(case, quick, 8) for case in (*few, *HELD_OUT)),
        *(_adapter(case, quick, 10) for case in long),
        _adapter(_case(1024, 64, 16384, "forward"), everything, 60, "compiled"),
    ]


def _more_models() -> list[Task]:
    blocks = [spec for spec in models.SPECS if spec.family == "block"]
    gpt2 = [spec for spec in models.SPECS if spec.family == "gpt2"]
    rest = [spec for spec in models.SPECS if spec.family in ("bert", "llama")]
    return [
        *(_model(gpt2[0], "step", how, 20) for how in ("eager", "graph")),
        *(_model(spec, "forward", "eager", 7) for spec in gpt2),
        *(
            _model(s, mode, how, 8)
            for s in blocks
            for mode in s.modes
            for how in ("graph", "eager")
        ),
        *(_model(s, mode, how, 10) for s in rest for mode in s.modes for how in ("eager", "graph")),
        *(_model(spec, mode, "graph", 8) for spec in models.PRESET_SPECS for mode in spec.modes),
        *(_model(blocks[0], mode, "compile", 60) for mode in blocks[0].modes),
        *(_model(spec, mode, "compile", 90) for spec in (*rest, gpt2[0]) for mode in spec.modes),
    ]


def _adapter(
    case: BenchCase,
    baselines: list[str],
    seconds: float,
    prefix: str = "adapter",
    tf32: bool = False,
) -> Task:
    def run(result: Result, bench: Bench) -> Rows:
        chosen: list[Provider] = [PROVIDERS[name] for name in (*bench.backends, *baselines)]
        settings = Settings(seconds=bench.seconds)
        measured = from_dict(result.header["calibration"])
        with _tf32() if tf32 else contextlib.nullcontext():
            if tf32:
                measured = _with_tf32_rate(measured, result, bench)
            new = measure_case(case, chosen, bench.timer, measured, settings)
        if tf32:
            _remark(new, TF32)
        result.rows = replaced(result.rows, new)
        return new

    return Task(f"{prefix} {case}{f' {TF32}' if tf32 else ''}", seconds, run)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """float32 products may use TF32, torch's and the kernels', which follow the same setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _with_tf32_rate(measured: Calibration, result: Result, bench: Bench) -> Calibration:
    """The calibration with float32's rate as it is now, which the header gets by its own name."""
    assert isinstance(bench.timer, CudaTimer)
    with bench.timer.session():
        rate = package.matrix_rate(bench.timer, 0.2, package.FLOAT32_SIZE, torch.float32)
    result.header["calibration"][TF32_RATE] = rate
    return replace(measured, matrix_rate_fp32=rate)


def _remark(rows: Rows, text: str) -> None:
    for row in rows:
        row.note = "; ".join(filter(None, [row.note, text]))


def _model(spec: models.Spec, mode: str, execution: str, seconds: float) -> Task:
    def run(result: Result, bench: Bench) -> Rows:
        small = not bench.on_gpu  # widths of a few units: that every variant runs
        dtype = torch.bfloat16 if bench.on_gpu else torch.float32
        new = model_level.measure_model(
            spec.tiny() if small else spec, mode, execution, bench.timer, dtype, bench.seconds
        )
        if small:
            _remark(new, "widths of a few units, to see it run")
        result.models = replaced(result.models, new)
        return new

    return Task(f"model {spec.name} {mode} {execution}", seconds, run)


def replaced(old: list[Any], new: Iterable[Row | ModelRow]) -> list[Any]:
    """Rows with those of the same key replaced by the new ones, which come last.

    A row with a time is not given up for one without.
    """
    timed = {row.key for row in old if _timed(row)}
    new = [row for row in new if _timed(row) or row.key not in timed]
    keys = {row.key for row in new}
    return [*(row for row in old if row.key not in keys), *new]


def _timed(row: Row | ModelRow) -> bool:
    return (row.time if isinstance(row, Row) else row.milliseconds) is not None


def nothing_timed(rows: Rows) -> str | None:
    """Why no implementation of a task's rows has a time; None if one has, or none can run here."""
    limits = ("no-adapter", "limit")
    rows = [row for row in rows if isinstance(row, ModelRow) or row.provider not in limits]
    broken = [row for row in rows if row.status not in ("ok", "unavailable")]
    return broken[0].note if broken and not any(map(_timed, rows)) else None


def _calibrate(result: Result, bench: Bench) -> Rows:
    timer = bench.timer
    assert isinstance(timer, CudaTimer)
    with timer.session():
        package.copy_bandwidth(timer, 0.2)  # idle clocks would say nothing of the run
        result.header["clocks_before"] = environment.clocks(timer.device)
        measured: Calibration = calibration.measure(timer, 2.0)
    result.header["calibration"] = measured.as_dict()
    return ()


def _host(result: Result, bench: Bench) -> Rows:
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
    return ()
