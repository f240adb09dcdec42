"""The parent's side of the measuring worker: one task after another, whatever hangs or dies.

The worker (`worker`) reads a task a line and answers with records and an end. It keeps no results,
so a hang or a lost device costs the task and a restart. A case that ended the worker is tried once
more for each of this package's backends alone, to find the one at fault.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.output import Output

START_SECONDS = 60.0  # imports and the device's context; tasks wait for it no longer
END_SECONDS = 2.0  # reserved in a step's time for the end of a worker
OUT_OF_TIME = "out of time"  # the note on a task that was left out, or cut


@dataclass(frozen=True)
class Task:
    """One measurement. seconds: its expected time; request: the worker's input.

    alone: the backend to which it was narrowed after the full task ended the worker.
    """

    name: str
    seconds: float
    request: dict[str, Any] = field(default_factory=dict)
    alone: str = ""

    @property
    def limit(self) -> float:
        """The seconds after which it counts as hung."""
        return 10 + 3 * self.seconds

    def narrowed(self, backend: str) -> "Task":
        """Return the task for one backend, beside plain layers (of many adapters: a single one) and
        the copy, which end with it."""
        plain = "single" if self.request.get("case", {}).get("adapters") else "plain"
        request = {**self.request, "backends": [backend], "baselines": [plain, "limit"]}
        request.pop("fault", None)  # a dry run's fault belongs to the full task
        return replace(self, name=f"{self.name} ({backend} alone)", request=request, alone=backend)


class Measuring:
    """Runs tasks in a worker that is started anew when it was lost."""

    def __init__(
        self,
        output: Output,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._output, self._command = output, command
        self._environment, self._folder, self._clock = environment, folder, clock
        self._worker: processes.Child | None = None
        self._reply: dict[str, Any] | None = None

    def run(self, tasks: Sequence[Task], deadline: float) -> bool:
        """Measure in the given order until the deadline; return whether every task was done."""
        left, all_done = deque(tasks), True
        while left:
            task = left.popleft()
            status, note, seconds = self._attempt(task, deadline - END_SECONDS)
            facts = {"task": task.name, "status": status, "seconds": seconds, "note": note}
            self._output.event("task", **facts)
            self._output.record("task", **facts)
            if status != "not run":
                self._output.say(f"  {task.name}: {status}, {seconds} s{_said(note)}")
            all_done = all_done and status == "done"
            if status in ("hung", "lost", "died") and not task.alone:
                left.extendleft(reversed(self._narrowed(task)))
        return all_done

    def _narrowed(self, task: Task) -> list[Task]:
        backends = self._output.last("header").get("backends", [])
        if task.request.get("do") != "adapter":
            return []
        return [task.narrowed(name) for name in backends]

    def _attempt(self, task: Task, deadline: float) -> tuple[str, str, float]:
        """Return (done, failed, hung, lost, died, cut or not run; a note; seconds).

        cut: the step's time was over before the task's own.
        """
        began = self._clock()
        if deadline - began < task.seconds:
            return "not run", OUT_OF_TIME, 0.0
        problem = self._start(deadline)
        if problem:
            return "died", problem, round(self._clock() - began, 1)
        assert self._worker is not None
        calibration = self._output.last("calibration").get("values", {})
        self._reply = None
        sent = self._worker.send(json.dumps({**task.request, "calibration": calibration}))
        limit = min(deadline, self._clock() + task.limit)
        in_time = sent and processes.watch([self._worker], limit, lambda: self._reply is not None)
        seconds = round(self._clock() - began, 1)
        reply = self._reply
        if reply is not None and reply["reply"] == "done":
            return reply["status"], reply["note"], seconds
        if reply is not None:  # the worker ends itself, for its device answers nothing any more
            self.close()
            return "lost", reply["note"], seconds
        hung = sent and not in_time and self._worker.process.poll() is None
        ended = self._worker.ended(late=hung)
        self.close()
        if ended.code is None and limit == deadline:
            return "cut", OUT_OF_TIME, seconds
        if ended.code is None:
            return "hung", f"killed after {seconds:.0f} s", seconds
        return "died", f"{ended}: {ended.last_line}"[:200], seconds

    def _start(self, deadline: float) -> str:
        """Start a worker if there is none; return why it did not start, or an empty string."""
        if self._worker is not None:
            return ""
        self._reply = None
        self._worker = processes.Child(
            "worker", self._command, self._take, self._environment, self._folder, stdin=True
        )
        limit = min(deadline, self._clock() + START_SECONDS)
        processes.watch([self._worker], limit, lambda: self._reply is not None)
        if self._reply is not None and self._reply["reply"] == "ready":
            return ""
        says = self._worker.last_line
        self.close()
        return f"the worker did not start: {says}"[:200]

    def _take(self, _child: processes.Child, stream: str, line: str) -> None:
        """Take one line of the worker: a record, an end of a task, or something for the log."""
        try:
            message = json.loads(line) if stream == "out" else None
        except json.JSONDecodeError:
            message = None
        if not isinstance(message, dict) or "reply" not in message:
            self._output.log("worker", line)
        elif message["reply"] == "record":
            self._output.record(**message["content"])
        else:
            self._reply = message

    def close(self) -> None:
        """End the worker, which would otherwise wait for the tasks of a later list."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def _said(note: str) -> str:
    return f", {note}" if note else ""
