"""The flat files of a run, appended line by line and flushed: a kill loses nothing written."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

# The files that a run leaves; `gpu.csv` and `junit.xml` are written by nvidia-smi and pytest.
EVENTS, ROWS, LOG = "events.jsonl", "rows.jsonl", "log.txt"
JUNIT, SAMPLES, SUMMARY, TUNED = "junit.xml", "gpu.csv", "summary.txt", "tuned.json"
# The quantities that nvidia-smi samples, in the order of gpu.csv's columns.
SAMPLED = (
    *("timestamp", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"),
    *("utilization.gpu", "clocks_event_reasons.active"),
)
FILES = (EVENTS, ROWS, LOG, JUNIT, SAMPLES, SUMMARY, TUNED)


class FolderError(ValueError):
    """A folder that a run cannot write to, or that holds an earlier one."""


class Output:
    """The files, and the entries of the first two, for the summary."""

    def __init__(self, folder: Path, say: Callable[[str], Any] = print) -> None:
        """Open the files.

        Raises:
            FolderError: the folder cannot be written to, or holds an earlier run: a run has its own
                calibration, so two are never mixed.
        """
        self.folder, self.say = folder, say
        self.events: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self._started = time.monotonic()
        there = [name for name in FILES if (folder / name).exists()]
        if there:
            raise FolderError(
                f"{folder} holds an earlier run ({', '.join(there)}).\n"
                "  hint: name an empty folder; `python -m benchmarks merge` combines runs"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._events, self._rows, self._log = (self._open(name) for name in (EVENTS, ROWS, LOG))
        except OSError as error:
            raise FolderError(
                f"cannot write to {folder}: {error.strerror}; choose a folder with --out"
            ) from error

    def _open(self, name: str) -> TextIO:
        return (self.folder / name).open("a", encoding="utf-8", errors="replace")

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return round(time.monotonic() - self._started, 1)

    def event(self, event: str, **facts: Any) -> None:
        """Write an event into events.jsonl."""
        entry = {"at": self.seconds, "event": event, **facts}
        self.events.append(entry)
        self._line(self._events, json.dumps(entry))

    def record(self, kind: str, **content: Any) -> None:
        """Write a measurement into rows.jsonl."""
        entry = {"record": kind, **content}
        self.records.append(entry)
        self._line(self._rows, json.dumps(entry))

    def log(self, source: str, line: str) -> None:
        """Write a line that a process printed into log.txt."""
        self._line(self._log, f"{self.seconds:7.1f} [{source}] {line}")

    def _line(self, file: TextIO, text: str) -> None:
        file.write(text + "\n")
        file.flush()

    def summarise(self, text: str) -> None:
        """Replace summary.txt in one step."""
        part = self.folder / f".{SUMMARY}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self.folder / SUMMARY)

    def last(self, kind: str) -> dict[str, Any]:
        """Return the newest record of a kind, empty if there is none."""
        found = (entry for entry in reversed(self.records) if entry["record"] == kind)
        return next(found, {})
