"""The result file: a header, rows of single adapters and of models, and a log of what was run.

One JSON object under a versioned schema, replaced as a whole by renaming, so that a reader and an
interrupted writer never see half a file.
"""

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterkern.bench.cases import BenchCase

SCHEMA = "adapterkern-bench/2"
STATUSES = ("ok", "unavailable", "wrong", "out_of_memory", "failed")
# What does not compute y: its time over ours is no ratio of like with like.
NO_RATIO = ("no-adapter", "routing")


class ResultError(ValueError):
    """A result file that cannot be read, or two that cannot be compared."""


class LostDeviceError(RuntimeError):
    """The GPU fails whatever this process asks of it, since an error in the work of `subject`.

    rows: those of the case that it ended, with what was measured before.
    """

    def __init__(self, message: str, subject: str = "") -> None:
        super().__init__(message)
        self.subject = subject
        self.rows: list[Row] = []


@dataclass(frozen=True)
class Timing:
    """Quantiles in microseconds of `samples` measurements, and these in the order taken (raw)."""

    p20: float
    p50: float
    p80: float
    samples: int
    raw: tuple[float, ...] = ()


@dataclass
class Row:
    """One provider on one case. What was not measured is None.

    timings: by kind, see `timing.KINDS`; headline: the kind that ratios and fractions use.
    buffer_bytes: activations and weights that a graph's calls take in turn; in L2 if they are
    smaller than it.
    copy_fraction: time of `limit` in the same case and kind of timing, over this one's.
    floor_us: the case's floor; floor_fraction, peak_fraction: bytes of the floor (of `limit`: its
    own) at the measured copy bandwidth and at the memory's peak bandwidth, over the measured time;
    gb_per_s: the same bytes over time; ratios: time of that provider over this one's.
    host_us: CPU time to launch a call; peak_bytes and transient_bytes: beyond what was allocated
    before a call, and beyond what is still alive after it; saved_bytes: kept for the backward
    beside inputs and parameters; kernels: nodes of a call's CUDA graph, copies and fills included.
    error, tolerance: those of the tensor closest to its tolerance, in the parity gate.
    repeatable: whether a second run gave the same bits.
    """

    case: BenchCase
    provider: str
    status: str = "ok"
    note: str = ""
    ours: bool = False
    headline: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    buffer_bytes: int | None = None
    gb_per_s: float | None = None
    copy_fraction: float | None = None
    floor_us: float | None = None
    floor_fraction: float | None = None
    peak_fraction: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    host_us: float | None = None
    peak_bytes: int | None = None
    transient_bytes: int | None = None
    saved_bytes: int | None = None
    kernels: int | None = None
    error: float | None = None
    tolerance: float | None = None
    repeatable: bool | None = None

    @property
    def key(self) -> str:
        """The row's identity across files."""
        return f"{self.case} {self.provider}"

    @property
    def label(self) -> str:
        """The name in tables and pictures, which says of our backends whose they are."""
        return f"adapterkern ({self.provider})" if self.ours else self.provider

    @property
    def time(self) -> Timing | None:
        """The headline timing, None where there is none."""
        return self.timings.get(self.headline)

    @property
    def timed(self) -> bool:
        """Whether there is a headline timing."""
        return self.time is not None


@dataclass
class ModelRow:
    """One variant of one model. Times in milliseconds, raw ones too; overhead in per cent of the
    plain model.

    execution: eager or graph; trained: parameters with a gradient, of `parameters`.
    """

    model: str
    variant: str
    mode: str
    execution: str
    status: str = "ok"
    note: str = ""
    milliseconds: Timing | None = None
    overhead_percent: float | None = None
    peak_bytes: int | None = None
    trained: int | None = None
    parameters: int | None = None

    @property
    def key(self) -> str:
        """The row's identity across files."""
        return f"{self.model} {self.variant} {self.mode} {self.execution}"

    @property
    def timed(self) -> bool:
        """Whether there is a time."""
        return self.milliseconds is not None


@dataclass
class Result:
    """A whole file. `host`: rows of the host-overhead suite; `log`: one entry a finished task."""

    header: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    host: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> str:
        """The GPU's name, or that of the CPU."""
        return self.header.get("device", "unknown device")

    @property
    def on_gpu(self) -> bool:
        return self.header.get("device_type") == "cuda"


def to_json(result: Result) -> str:
    """Return a result file's text: a line for a list's entry, as raw samples would fill pages."""
    parts = [f'"schema": {json.dumps(SCHEMA)}']
    for name, value in dataclasses.asdict(result).items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(entry) for entry in value) + "\n]"
        else:
            text = json.dumps(value, indent=1)
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def from_json(text: str, origin: str = "result file") -> Result:
    """Return the result in the text of a result file.

    Raises:
        ResultError: not JSON, another schema or version of it, or a row that does not fit it.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultError(f"{origin} is not JSON ({error}).") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ResultError(
            f"{origin} has schema {schema!r}, this version reads {SCHEMA!r}.\n"
            "  hint: measure again, or read it with the version of adapterkern that wrote it"
        )
    try:
        return Result(
            header=dict(data["header"]),
            rows=[_row(entry) for entry in data["rows"]],
            models=[_model_row(entry) for entry in data["models"]],
            host=list(data["host"]),
            log=list(data["log"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{origin} does not fit {SCHEMA}: {error!r}") from error


def _row(entry: dict[str, Any]) -> Row:
    timings = {kind: _timing(timing) for kind, timing in entry["timings"].items()}
    if entry["status"] not in STATUSES:
        raise ValueError(f"unknown status {entry['status']!r}")
    return Row(**{**entry, "case": BenchCase(**entry["case"]), "timings": timings})


def _model_row(entry: dict[str, Any]) -> ModelRow:
    timing = entry["milliseconds"]
    return ModelRow(**{**entry, "milliseconds": None if timing is None else _timing(timing)})


def _timing(entry: dict[str, Any]) -> Timing:
    return Timing(**{**entry, "raw": tuple(entry["raw"])})


def save(result: Result, path: Path) -> None:
    """Replace `path` by this result in one step.

    Raises:
        OSError: the folder cannot be written to.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(to_json(result))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path) -> Result:
    """Return the result in a file.

    Raises:
        ResultError: the file cannot be read or is not of this schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"cannot read {path}: {error}") from error
    return from_json(text, str(path))


def unwritable(folder: Path) -> str | None:
    """Return why nothing can be written to `folder`, which is made if need be; None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"cannot write to {folder}: {error.strerror or error}"
    return None
