"""The events of `adapterkern check` put together: a line as each case ends, a table of all."""

import math
import textwrap
import time

from adapterkern.cli.check.worker import Event
from adapterkern.grouped.call import GroupedNeeds
from adapterkern.parity import share
from adapterkern.spec import TENSOR_NAMES

_GRADIENTS = dict.fromkeys((*TENSOR_NAMES[1:], *GroupedNeeds._fields[1:]))
_ORDER = ("y", "normed", "dx", *(f"d_{name}" for name in _GRADIENTS), "-")  # the table's rows
WIDTH = 80  # of what has no long name of a case in it
_MOST_MISSES = 20  # listed one by one
_VERDICTS = {"missed": "MISSED", "raised": "RAISED", "lost": "LOST"}  # these stand out


class Outcome:
    """The events of all backends, put together."""

    def __init__(self) -> None:
        self.backends: list[Event] = []  # those of kind "backend"
        self.cases: dict[str, list[Event]] = {}
        self._started = time.monotonic()

    def add(self, event: Event) -> None:
        if event["event"] == "backend":
            self.backends.append(event)
            self.cases[event["backend"]] = []
        elif event["event"] == "case":
            self.cases[event["backend"]].append(event)

    def rows(self, backend: str) -> list[dict]:
        """Return the comparisons of one backend, each with its case."""
        return [
            {**row, "case": event["case"]} for event in self.cases[backend] for row in event["rows"]
        ]

    def passed(self, named: bool, whole: bool) -> bool:
        """Return whether nothing failed. A backend that was asked for by name must be there, and
        run at least one of its cases where these are the `whole` list."""
        for backend in self.backends:
            rows = self.rows(backend["backend"])
            absent = backend["unavailable"] is not None
            idle = whole and backend["cases"] > 0 and not rows
            if (named and (absent or idle)) or not all(row["passed"] for row in rows):
                return False
        return True

    def end(self, passed: bool) -> Event:
        """Return the event that closes the stream."""
        rows = [row for backend in self.cases for row in self.rows(backend)]
        return {
            "event": "end",
            "passed": passed,
            "comparisons": len(rows),
            "missed": sum(not row["passed"] for row in rows),
            "cases": sum(bool(event["rows"]) for events in self.cases.values() for event in events),
        }

    def ran(self) -> list[str]:
        """Return the backends that were compared."""
        return [name for name in self.cases if self.rows(name)]

    def is_lost(self, backend: str) -> bool:
        """Return whether a backend stopped at a case that lost the device, or its process."""
        return any(event["status"] == "lost" for event in self.cases[backend])

    def seconds(self) -> float:
        """Return the time since the beginning."""
        return time.monotonic() - self._started

    def render(self) -> str:
        """Return the table of every backend."""
        lines = [
            "error: rms relative to float64; tolerance: twice (gradients: three times) the",
            "error of plain PyTorch in the same dtype, at least one rounding",
        ]
        for backend in self.backends:
            lines += ["", *self._render_backend(backend)]
        return "\n".join(lines)

    def _render_backend(self, backend: Event) -> list[str]:
        name = backend["backend"]
        if backend["unavailable"] is not None:
            return [wrapped(f"{name}: not run, {backend['unavailable']}")]
        events, rows = self.cases[name], self.rows(name)
        activations = len({row["activation"] for row in rows})
        seconds = sum(event["seconds"] for event in events)
        told = (
            f"{name} on {backend['device']}: {sum(bool(event['rows']) for event in events)} cases, "
            f"{activations} activations, {len(rows)} comparisons ({seconds:.1f} s)"
        )
        lines = [wrapped(told)]
        worst: dict[tuple[str, str], dict] = {}
        for row in rows:
            key = row["dtype"], row["tensor"].split()[0]
            if key not in worst or _share(row) > _share(worst[key]):
                worst[key] = row
        table: list[tuple[str, ...]] = [
            ("dtype", "tensor", "error", "tolerance", "used", "closest case")
        ]
        for dtype, tensor in sorted(worst, key=lambda key: (key[0], _ORDER.index(key[1]))):
            row = worst[dtype, tensor]
            table.append((dtype, tensor, *_numbers(row), row["case"]))
        missed = [row for row in rows if not row["passed"]]
        lines += _aligned(table) + list(map(_render_miss, missed[:_MOST_MISSES]))
        if len(missed) > _MOST_MISSES:
            lines.append(f"  and {len(missed) - _MOST_MISSES} more misses; --json has all of them")
        refused: dict[str, int] = {}
        for event in events:
            if event["status"] == "refused":
                refused[event["note"]] = refused.get(event["note"], 0) + 1
        lines += [f"  not run: {count} cases, {reason}" for reason, count in refused.items()]
        return lines


def line_of(event: Event) -> str:
    """Return one line: a case's verdict, the worst share of a tolerance, seconds, its id."""
    if event["event"] == "backend":
        if event["unavailable"] is not None:
            return wrapped(f"{event['backend']}: not run, {event['unavailable'].splitlines()[0]}")
        return f"{event['backend']} on {event['device']}: {event['cases']} cases"
    verdict = _VERDICTS.get(event["status"], event["status"])
    note = event["note"]
    used = ""
    if event["status"] in ("passed", "missed"):
        worst = max(event["rows"], key=_share)
        used = _numbers(worst)[2]
        if event["status"] == "missed":
            over = [row["tensor"] for row in event["rows"] if not row["passed"]]
            note = ", ".join([worst["tensor"], *(t for t in over if t != worst["tensor"])])
    note = f"  {note}" if note else ""
    return f"{verdict:8}{used:>5}{event['seconds']:7.1f} s  {event['case']}{note}"


def wrapped(text: str, indent: str = "  ") -> str:
    """Return text within WIDTH; the lines that it has stay apart."""
    lines = [
        textwrap.fill(
            line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def _render_miss(row: dict) -> str:
    error, tolerance, _ = _numbers(row)
    note = f" ({row['note']})" if row["note"] else ""
    return f"  MISSED {row['case']} {row['tensor']}: {error} of {tolerance}{note}"


def _share(row: dict) -> float:
    """Return the part of its tolerance that an error uses up; JSON has null if not finite."""
    if row["error"] is None or row["tolerance"] is None:
        return math.inf
    return share(row["error"], row["tolerance"])


def _numbers(row: dict) -> tuple[str, str, str]:
    error, tolerance = (
        "-" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "tolerance")
    )
    part = _share(row)
    used = f"{part:.0%}" if part < 10 else f"{part:.0f}x" if math.isfinite(part) else "-"
    return error, tolerance, used


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    """Align rows in columns, numbers (the third to the fifth) to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if 2 <= index <= 4 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
