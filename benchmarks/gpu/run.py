"""The parent of a run starts steps with hard limits, writes results as they come, and sums them up.

It uses the standard library alone and never touches the device, so no failure there can end it.
"""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import digest, pack, processes, stages
from benchmarks.gpu.measuring import OUT_OF_TIME, Measuring, Task
from benchmarks.gpu.output import SAMPLED, SAMPLES, Output
from benchmarks.gpu.pack import ROOT

SAMPLE_MILLISECONDS = 200
_LEAST_SECONDS = 3.0  # a step that has less is not begun


class NoCommitError(RuntimeError):
    """The tree's commit is unknown, so measurements would belong to nothing."""


@dataclass(frozen=True)
class Options:
    """The command line. faults: in dry runs, by step, the fault in place of the first task."""

    stage: str
    out: Path
    seconds: float = stages.SECONDS
    dry: bool = False
    faults: Mapping[str, str] = field(default_factory=dict)
    wanted: stages.Wanted = field(default_factory=stages.Wanted)


def run(options: Options, say: Callable[[str], Any] = print) -> int:
    """Run a stage; 0 if every step ran and passed, 130 if it was interrupted, else 1.

    Raises:
        NoCommitError: neither git nor a pack tells the commit of this tree.
        pack.PackError: the pack is of another tree.
        output.FolderError: the folder cannot be written to, or holds an earlier run.
    """
    found = pack.Pack.read()
    commit, dirty = _identity(found)
    output = Output(options.out, say)
    if options.dry:
        found = None  # a dry run uses this tree as it is installed here
    elif found is not None and not found.fits():
        say(f"{pack.FOLDER} was packed from other sources than this tree and is left out")
        found = None
    deadline = time.monotonic() + options.seconds - stages.CLOSING_SECONDS
    passed = interrupted = False
    with _terminable(), tempfile.TemporaryDirectory(prefix="adapterkern-site-") as folder:
        site = Path(folder)
        output.event("begin", stage=options.stage, commit=commit, seconds=options.seconds)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if found is not None:
            found.unpack(site, ROOT, suffix, say)
        stage = _Stage(options, output, deadline, site, _words(options, commit, dirty), found)
        sampler = stage.sampler()
        try:
            passed = stage.run_steps()
        except KeyboardInterrupt:
            interrupted = True
            output.event("interrupted", during=stage.step)
        finally:
            stage.close()
            if sampler is not None:
                stage.end_sampler(sampler)
            output.record("end", stage=options.stage, finished=stage.finished, passed=passed)
            output.event("end", passed=passed)
            text = digest.summary(output.events, output.records, options.out)
            output.summarise(text)
    say(text)
    return 130 if interrupted else 0 if passed else 1


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does: with its children, and with a summary."""

    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _identity(found: pack.Pack | None) -> tuple[str, bool]:
    """Return (commit, whether the tree differs from it).

    A pack of these very sources knows best: a copy of a tree may bring along a git folder whose
    head is older.
    """
    if found is not None and found.fits():
        return found.commit, found.dirty
    by_git = pack.commit_of()
    if by_git is not None:
        return by_git
    if found is None:
        raise NoCommitError(
            f"{ROOT} has no git commit and no pack ({pack.FOLDER}), so nobody could tell of what "
            "the numbers are.\n  hint: run `python -m benchmarks pack` where the repository is, "
            "and bring its folder along"
        )
    found.check()
    return found.commit, found.dirty


def _words(options: Options, commit: str, dirty: bool) -> dict[str, tuple[str, ...]]:
    """Return the values of the words in braces of a command."""
    identity = ("--stage", options.stage, "--commit", commit)
    identity += ("--command", " ".join(["python -m benchmarks", *sys.argv[1:]]))
    identity += (*(("--dirty",) if dirty else ()), *(("--dry",) if options.dry else ()))
    parallel = not options.dry and importlib.util.find_spec("xdist") is not None
    return {
        "{python}": (sys.executable,),
        "{identity}": identity,
        "{parallel}": ("-n", str(stages.PROCESSES)) if parallel else (),
    }


class _Stage:
    """One stage in progress."""

    def __init__(
        self,
        options: Options,
        output: Output,
        deadline: float,
        site: Path,
        words: dict[str, tuple[str, ...]],
        packed: pack.Pack | None = None,
    ) -> None:
        self.options, self.output, self.deadline = options, output, deadline
        self._words = words
        path = os.pathsep.join(filter(None, (str(ROOT), str(site), os.environ.get("PYTHONPATH"))))
        # The kernels that no GPU has run yet are what such a run is for.
        self._environment = {"ADAPTERKERN_CUDA_RESIDENT": "1", **os.environ}
        self._environment |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self._kernels_of = packed.triton if packed is not None else None
        if self._kernels_of is not None:
            self._environment["TRITON_CACHE_DIR"] = str(pack.CACHE)
        worker = [sys.executable, "-m", "benchmarks.gpu.worker"]
        worker += ["--dry"] if options.dry else []
        self._measuring = Measuring(output, worker, self._environment, ROOT)
        self._failed_checks = 0
        self.finished = False  # whether every check passed, and nothing was left out
        self.step = ""
        self._during: dict[str, str] = {}  # command -> the parity case that it is in

    def sampler(self) -> processes.Child | None:
        """Start nvidia-smi, which writes clocks, power and throttle reasons into gpu.csv."""
        if self.options.dry:
            (self.output.folder / SAMPLES).write_text("a dry run has no GPU to sample\n")
            return None
        command = ["nvidia-smi", f"--query-gpu={','.join(SAMPLED)}", "--format=csv,nounits"]
        command += ["-lms", str(SAMPLE_MILLISECONDS), "-f", str(self.output.folder / SAMPLES)]
        return self._child("nvidia-smi", tuple(command), {})

    def end_sampler(self, sampler: processes.Child) -> None:
        """End nvidia-smi; if it ended by itself, record that clocks are missing."""
        if sampler.process.poll() is not None:
            processes.watch([sampler], time.monotonic() + 1.0)
            end = sampler.ended(late=False)
            facts = {"status": str(end), "says": end.last_line[:200]}
            self.output.event("command", step="clocks", command=sampler.name, **facts)
        sampler.kill()

    def run_steps(self) -> bool:
        """Run every step in its order; return whether all passed.

        A step may use the time that earlier ones saved: it ends when the limits up to its own do.
        """
        passed, checked, planned = True, True, time.monotonic()
        for step in stages.steps(self.options.stage, self.options.wanted, self.options.dry):
            reason = self._skipped(step)
            if reason is None and self.deadline - time.monotonic() < _LEAST_SECONDS:
                reason, passed = OUT_OF_TIME, False
            if reason is not None:
                self.output.event("step", step=step.name, status="not run", note=reason)
                self.output.say(f"{step.name}: not run, {reason}")
                continue
            began, planned = time.monotonic(), planned + step.limit
            status = self._run(step, min(planned, self.deadline))
            seconds = round(time.monotonic() - began, 1)
            self.output.event("step", step=step.name, status=status, seconds=seconds)
            self.output.say(f"{step.name}: {status}, {seconds} s")
            passed = passed and status == "passed"
            checked = checked and (status == "passed" or isinstance(step, stages.Measure))
            self.output.summarise(
                digest.summary(self.output.events, self.output.records, self.options.out)
            )
            if step.name == "machine" and not self.output.last("header"):
                return False  # nobody knows what would be measured
        left_out = [entry for entry in self.output.events if entry.get("note") == OUT_OF_TIME]
        self.finished = checked and not left_out
        return passed

    def _skipped(self, step: stages.Step) -> str | None:
        """Return why a step is skipped; None if it is not."""
        if not isinstance(step, stages.Commands):
            return None
        if step.gpu and self.options.dry:
            return "needs a GPU"
        built = self.output.last("header").get("extension", {})
        if step.needs_build and built.get("problem") is None:
            return "the extension is there"
        return None

    def _run(self, step: stages.Step, deadline: float) -> str:
        self.step = step.name
        if isinstance(step, stages.Measure):
            return "passed" if self._measuring.run(self._tasks(step), deadline) else "failed"
        self._measuring.close()  # it holds memory that the commands may need
        self._failed_checks = 0
        self._during.clear()
        children = [
            self._child(name, words, step.environment) for name, words in step.commands.items()
        ]
        ends = processes.run(children, deadline)
        for end in ends:
            facts = {"status": str(end), "seconds": end.seconds, "says": end.last_line[:200]}
            if end.status != "passed" and end.name in self._during:
                facts["says"] = f"during {self._during[end.name]}; {facts['says']}"
            self.output.event("command", step=step.name, command=end.name, **facts)
        bad = [end for end in ends if end.status != "passed"]
        for end in bad[:4]:
            self.output.say(f"  {end.name}: {end}, {end.last_line[:120]}")
        if not ends:
            return "failed"  # a stage that names no command checks nothing
        return "failed" if bad or self._failed_checks else "passed"

    def _tasks(self, step: stages.Measure) -> list[Task]:
        tasks = list(step.tasks)
        fault = self.options.faults.get(step.name)
        if fault:
            tasks[0] = replace(tasks[0], seconds=0.5, request={**tasks[0].request, "fault": fault})
        return tasks

    def close(self) -> None:
        """End the measuring worker."""
        self._measuring.close()

    def _child(
        self, name: str, words: tuple[str, ...], environment: dict[str, str]
    ) -> processes.Child:
        command: list[str] = []
        for word in words:
            command += self._words.get(word, (word.replace("{out}", str(self.output.folder)),))
        settings = {**self._environment, **environment}
        capability = str(self.output.last("header").get("capability", "")).replace(".", "")
        arch = "sm_90a" if capability == "90" else f"sm_{capability}"
        settings = {name: value.replace("{arch}", arch) for name, value in settings.items()}
        return processes.Child(name, command, self._take, settings, ROOT)

    def _take(self, child: processes.Child, stream: str, line: str) -> None:
        """Take one line of a command: the header, a parity check's event, or something to log."""
        try:
            message = json.loads(line) if stream == "out" else None
        except json.JSONDecodeError:
            message = None
        if not isinstance(message, dict):
            self.output.log(child.name, line)
            if child.name == "machine" and stream == "err":
                self.output.say(line)
        elif "header" in message:
            self.output.record("header", **message["header"])
            if self._kernels_of not in (None, message["header"].get("triton_key")):
                other = f"they are for the Triton of key {self._kernels_of}"
                self.output.say(f"the packed kernels are of no use here: {other}")
        elif message.get("event") in ("backend", "begin", "case", "end"):
            self._failed_checks += message.get("passed") is False
            event = message.pop("event")
            if event == "begin":
                self._during[child.name] = message["case"]
            elif event == "case":
                self._during.pop(child.name, None)
            self.output.event(f"check {event}", step=self.step, command=child.name, **message)
        else:
            self.output.log(child.name, line)
