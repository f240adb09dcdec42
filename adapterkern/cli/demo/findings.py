"""The findings of a run, as data and as JSON; `wording.py` and `plot.py` show them."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 2  # of the JSON; raised when a field changes its meaning


@dataclass
class TaskResult:
    """One task under one method. Accuracies are shares of the held-out texts, means over seeds."""

    task: str
    num_classes: int
    head: int  # parameters of its head, trained as well
    before: float  # untrained: the base model with a random head
    after: float
    interval: list[float]  # [low, high] of `after`, 95 %; of what, `Report.interval_of` tells
    by_seed: list[float]  # `after` of each seed, in the order of Report.seeds
    losses: list[float] = field(repr=False)  # one per step, of the first seed


@dataclass
class MethodResult:
    """One way of training, over all tasks. Counts are of one task."""

    method: str
    label: str
    trained: int  # parameters, without the head
    total: int  # of the model with one adapter, without heads
    learning_rate: float
    settings: dict[str, Any]
    step_ms: float  # median of the training steps, which the methods take in turn
    peak_bytes: int | None  # on a GPU, of one training step; None on a CPU
    tasks: list[TaskResult]

    @property
    def share(self) -> float:
        """Trained parameters over all parameters of the model."""
        return self.trained / self.total


@dataclass
class Check:
    """A promise and whether it held."""

    name: str
    passed: bool
    detail: str
    numbers: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class Difference:
    """Held-out accuracy of the adapters less that of another method, on one task.

    interval: [low, high], 95 %, of the difference; paired, text by text or seed by seed.
    """

    task: str
    method: str  # the other
    mean: float
    interval: list[float]


@dataclass
class StepTime:
    """Median milliseconds of a training step; a claim about speed only where `is_speed_claim`.

    norm_ms: of the adapters with the norm in their pass. Where it is there, all are times of a
    batch's logits: in training, dropout between the two forbids it.
    """

    dtype: str
    tokens: list[int]  # [B, L]
    backend: str
    fused_ms: float
    eager_ms: float
    repeats: int
    is_speed_claim: bool
    norm_ms: float | None = None


@dataclass
class MixedTime:
    """Median milliseconds of a batch whose texts take adapters of their own, in one run and in a
    run for each adapter; a claim about speed only where `is_speed_claim`."""

    dtype: str
    tokens: list[int]  # [B, L]
    backend: str
    mixed_ms: float
    switched_ms: float
    runs: int  # in `switched_ms`; one of them is of the texts without an adapter
    repeats: int
    is_speed_claim: bool


@dataclass
class Report:
    """All findings of a run."""

    command: dict[str, Any]  # options
    seeds: list[int]
    interval_of: str  # "texts": bootstrap over the held-out texts; "seeds": spread over the seeds
    versions: dict[str, str | None]
    machine: dict[str, Any]
    model: dict[str, Any]
    corpus: dict[str, Any]
    majority: dict[str, float]  # by task, on the held-out texts
    methods: list[MethodResult]
    differences: list[Difference]
    checks: list[Check]
    step_times: list[StepTime]
    saved: dict[str, Any]  # folders and bytes
    seconds: float
    mixed_times: list[MixedTime] = field(default_factory=list)
    format: int = FORMAT

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """The report as JSON text; `from_json` reads it back to an equal report."""
        return json.dumps(asdict(self), indent=2, allow_nan=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote.

        Raises:
            ValueError: another format.
        """
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise ValueError(
                f"the report must have format {FORMAT}, got {data.get('format')!r}: another "
                "version of adapterkern wrote it.\n  hint: let `adapterkern demo` write a new one"
            )
        data["methods"] = [
            MethodResult(**{**m, "tasks": [TaskResult(**t) for t in m["tasks"]]})
            for m in data["methods"]
        ]
        data["differences"] = [Difference(**one) for one in data["differences"]]
        data["checks"] = [Check(**check) for check in data["checks"]]
        data["step_times"] = [StepTime(**step) for step in data["step_times"]]
        data["mixed_times"] = [MixedTime(**mixed) for mixed in data.get("mixed_times", [])]
        return cls(**data)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a scratch path of the same suffix, which replaces `path` in one step."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        unfinished = Path(scratch) / path.name
        write(unfinished)
        os.replace(unfinished, path)
