"""The whole report: in order of worth, within the time given, resumable, saved after each task."""

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapterkern.backends import NAMES, get
from adapterkern.bench import calibration, environment
from adapterkern.bench.results import Result, ResultError, load, save
from adapterkern.bench.timing import CudaTimer, timer_for
from benchmarks import pictures, preflight, summary
from benchmarks.tasks import Bench, Task, tasks

# Of the time given: for the checks at the start, and for pictures and the second copy at the end.
PREFLIGHT_SHARE = 0.35
FULL_CHECK_MINUTES = 20.0  # below, the parity check takes every activation at one size
CLOSING_SECONDS = 5.0


@dataclass(frozen=True)
class Options:
    """The command line. tiny: sizes that only show that the report works."""

    out: Path
    minutes: float = 9.0
    build: bool = True
    check: bool = True
    tiny: bool = False


def run(options: Options, say: Callable[[str], Any] = print) -> Path:
    """Measure, and write <date>-<commit>.json, .md and the pictures into the folder.

    An unfinished file of the same commit and device in that folder is continued: its finished tasks
    are not run again. Returns the path of the JSON file.
    """
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fresh = environment.header(device, environment.command_line("python -m benchmarks"))
    path, result = _begin(options.out, fresh)
    say(_opening(result, path))
    save(result, path)
    _preflight(result, path, options, deadline, say)
    _measure(result, path, options, deadline, say)
    _close(result, path, device)
    say(f"written to {path.parent}: {', '.join(sorted(p.name for p in _outputs(path)))}")
    return path


def _begin(out: Path, header: dict[str, Any]) -> tuple[Path, Result]:
    """The file to write, and what an interrupted run of the same commit left in it."""
    for path in sorted(out.glob("*.json"), reverse=True):
        try:
            found = load(path)
        except ResultError:
            continue  # another program's file, or another version's: left alone
        same = all(found.header.get(k) == header[k] for k in ("commit", "dirty", "device"))
        if same and not found.header.get("finished"):
            found.header.setdefault("resumed", []).append(header["created"])
            return path, found
    date = datetime.date.today().isoformat()
    stem = f"{date}-{(header['commit'] or 'no-commit')[:9]}"
    path, number = out / f"{stem}.json", 2
    while path.exists():
        path, number = out / f"{stem}-{number}.json", number + 1
    return path, Result({**header, "outcomes": {}, "finished": False})


def _opening(result: Result, path: Path) -> str:
    done = sum(entry["status"] == "done" for entry in result.log)
    where = f"continuing {path}, {done} tasks done" if done else f"writing {path}"
    first = "" if result.on_gpu else "no GPU here: sizes for a CPU, and nothing about the kernels\n"
    return f"{first}{result.device}: {where}"


def _preflight(
    result: Result, path: Path, options: Options, deadline: float, say: Callable[[str], Any]
) -> None:
    """Build, parity check and GPU tests; a failure is recorded and the measuring goes on."""
    outcomes = result.header["outcomes"]
    commands = preflight.steps(quick=options.minutes < FULL_CHECK_MINUTES, build=options.build)
    if not options.check:
        commands = {name: command for name, command in commands.items() if name == "build"}
    end = time.monotonic() + PREFLIGHT_SHARE * (deadline - time.monotonic())
    for name, command in commands.items():
        if outcomes.get(name, {}).get("status") == "passed":
            continue
        if name == "gpu_tests" and not result.on_gpu:
            outcomes[name] = {"status": "no GPU", "seconds": 0.0, "says": ""}
        else:
            left = end - time.monotonic()
            outcomes[name] = preflight.run(command, left * preflight.SHARES[name])
        save(result, path)
        say(f"{name}: {outcomes[name]['status']}, {outcomes[name]['seconds']} s")


def _measure(
    result: Result, path: Path, options: Options, deadline: float, say: Callable[[str], Any]
) -> None:
    timer = timer_for(torch.device("cuda" if result.on_gpu else "cpu"))
    bench = Bench(timer, _backends(result.on_gpu), tiny=options.tiny)
    if options.tiny:
        bench = replace(bench, seconds=0.01)
    work = tasks(bench)
    for number, task in enumerate(work, 1):
        if any(entry["task"] == task.name and entry["status"] == "done" for entry in result.log):
            continue
        left = deadline - CLOSING_SECONDS * (not options.tiny) - time.monotonic()
        entry = _run_task(task, result, bench, left)
        result.log = [old for old in result.log if old["task"] != task.name] + [entry]
        save(result, path)
        say(f"[{number}/{len(work)}] {task.name}: {entry['status']}, {entry['seconds']} s")


def _run_task(task: Task, result: Result, bench: Bench, left: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"task": task.name, "status": "done", "seconds": 0.0}
    if left < task.seconds:
        return {**entry, "status": "out of time"}
    start = time.monotonic()
    try:
        task.run(result, bench)
    except Exception as error:  # a task that fails must not lose what the others measure
        entry |= {"status": "failed", "note": f"{type(error).__name__}: {error}"[:300]}
    return {**entry, "seconds": round(time.monotonic() - start, 1)}


def _backends(on_gpu: bool) -> list[str]:
    fused = [name for name in NAMES if name != "reference" and not get(name).unavailable_reason()]
    return fused if on_gpu and fused else ["reference"]


def _close(result: Result, path: Path, device: torch.device) -> None:
    """The second copy and clocks, which tell a steady run; pictures and summary."""
    timer = timer_for(device)
    if isinstance(timer, CudaTimer):
        with timer.session():
            after = calibration.copy_bandwidth(timer, 0.3)
        result.header["calibration"]["copy_bandwidth_after"] = after
        result.header["clocks_after"] = environment.clocks(device)
    result.header["finished"] = all(entry["status"] == "done" for entry in result.log)
    save(result, path)
    path.with_suffix(".md").write_text(summary.summary(result), encoding="utf-8")
    pictures.draw(result, path)


def _outputs(path: Path) -> list[Path]:
    return [found for found in path.parent.iterdir() if found.name.startswith(path.stem)]
