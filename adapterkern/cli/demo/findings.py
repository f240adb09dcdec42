"""The findings of a run, as data, as JSON and as a table to read."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 2  # of the JSON; raised when a field changes its meaning
MIB = 2**20


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
            raise ValueError(f"the report must have format {FORMAT}, got {data.get('format')!r}.")
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


def as_text(report: Report) -> str:
    """The report to read on a terminal or in a log; no colours, no cursor movements."""
    model, corpus = report.model, report.corpus
    lines = [
        f"model    {model['name']}: {model['type']}, hidden size {model['hidden_size']}, "
        f"{model['num_adapters']} adapters of width {model['bottleneck_size']}",
        f"text     {corpus['texts']:,} docstrings from {corpus['modules']} modules of Python's "
        f"standard library: {corpus['train']:,} to train on, {corpus['held_out']:,} held out",
        f"training {report.command['steps']} steps of {report.command['batch_size']} texts for "
        f"each task and method, seed {report.command['seed']}, on {report.machine['device']}",
        "",
        *_table(_method_rows(report)),
        "",
        *(
            f"{'ok    ' if c.passed else 'FAILED'}  {c.name}\n        {c.detail}"
            for c in report.checks
        ),
        "",
        f"saved adapter   {report.saved['adapter_bytes'] / MIB:.2f} MiB a task with its head; "
        f"a full model {report.saved['model_bytes'] / MIB:.1f} MiB",
        *(_mixed_lines(mixed) for mixed in report.mixed_times),
        *(_step_line(step) for step in report.step_times),
        f"peak memory     {_peak_meaning(report)}",
        f"whole run       {report.seconds:.0f} s",
    ]
    return "\n".join(lines)


def _method_rows(report: Report) -> list[list[str]]:
    tasks = [task.task for task in report.methods[0].tasks]
    header = ["", "trained", "share", *(f"{task}: before, after" for task in tasks)]
    rows = [[*header, "training", "peak memory"]]
    majority = [f"{report.majority[task]:.1%}" for task in tasks]
    rows.append(["majority class", "", "", *majority, "", ""])
    for method in report.methods:
        rows.append(
            [
                method.label,
                f"{method.trained:,}",
                f"{method.share:.2%}",
                *(f"{task.before:.1%}  {task.after:.1%}" for task in method.tasks),
                f"{sum(task.seconds for task in method.tasks):.0f} s",
                "unknown" if method.peak_bytes is None else f"{method.peak_bytes / MIB:,.0f} MiB",
            ]
        )
    return rows


def _table(rows: list[list[str]]) -> list[str]:
    """Columns padded to their widest cell; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _step_line(step: StepTime) -> str:
    what, norm, best = "step time    ", "", step.fused_ms
    if step.norm_ms is not None:
        what, best = "forward time ", step.norm_ms
        norm = f"with fuse_norms {step.norm_ms:.0f} ms, "
    line = (
        f"{what}   {norm}fused {step.fused_ms:.0f} ms ({step.backend} backend), "
        f"eager {step.eager_ms:.0f} ms; {step.tokens[0]} x {step.tokens[1]} tokens, {step.dtype}, "
        f"median of {step.repeats}"
    )
    if step.is_speed_claim:
        return f"{line}: {step.eager_ms / best:.2f} times as fast"
    return f"{line}\n                no claim about speed: that takes a GPU and a fused kernel"


def _mixed_lines(mixed: MixedTime) -> str:
    line = (
        f"mixed batch     one run {mixed.mixed_ms:.0f} ms, {mixed.runs} switched runs "
        f"{mixed.switched_ms:.0f} ms; {mixed.tokens[0]} x {mixed.tokens[1]} tokens, "
        f"{mixed.dtype}, median of {mixed.repeats}\n{16 * ' '}"
    )
    if mixed.is_speed_claim:
        times = mixed.switched_ms / mixed.mixed_ms
        return f"{line}{mixed.backend} backend: {times:.2f} times as fast"
    how = "in plain PyTorch, one after another" if mixed.backend == "reference" else mixed.backend
    return f"{line}its adapters ran {how}: no claim about speed"


def _peak_meaning(report: Report) -> str:
    what = "torch's allocator" if report.machine["device"].startswith("cuda") else "the process"
    span = "while that method ran" if report.peak_is_per_method else "up to the end of that method"
    return f"of {what}, {span}"
