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
from adapterkern.bench.plot import refusal
from adapterkern.bench.results import Result, ResultError, load, save
from adapterkern.bench.timing import CudaTimer, timer_for
from benchmarks import pictures, preflight, summary
from benchmarks.tasks import Bench, Task, nothing_timed, tasks

# Of the time given: for the checks at the start, and for pictures and the second copy at the end.
PREFLIGHT_SHARE = 0.35
FULL_CHECK_MINUTES = 20.0  # below, the parity check takes every activation at one size
CLOSING_SECONDS = 5.0


@dataclass(frozen=True)
class Options:
    """The command line. tiny: sizes that only show that the report works.

    backends: those that are timed, in place of all that can run here; commit: of a source tree
    without git.
    """

    out: Path
    minutes: float = 9.0
    build: bool = True
    check: bool = True
    tiny: bool = False
    backends: tuple[str, ...] = ()
    commit: str | None = None


def run(options: Options, say: Callable[[str], Any] = print) -> Path:
    """Measure, and write <date>-<commit>.json, .md and the pictures into the folder.

    An unfinished file of the same commit, device and versions in that folder is continued: what is
    done there is not run again, unless it was done with other backends. Returns the path of the
    JSON file.
    """
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fresh = environment.header(device, environment.command_line("python -m benchmarks"))
    fresh["commit"] = fresh["commit"] or options.commit
    path, result = _begin(options.out, fresh)
    say(_opening(result, path))
    no_pictures = refusal(path.with_suffix(".png"))
    if no_pictures:
        say(f"no pictures: {no_pictures}")
    save(result, path)
    _preflight(result, path, options, deadline, say)
    _attempt(result, "measuring", lambda: _measure(result, path, options, deadline, say))
    _close(result, path, device, no_pictures)
    for name in ("measuring", "second copy", "summary", "pictures"):
        if name in result.header["outcomes"]:
            say(f"{name}: failed, {result.header['outcomes'][name]['says']}")
    say(f"written to {path.parent}: {', '.join(sorted(p.name for p in _outputs(path)))}")
    return path


def _begin(out: Path, header: dict[str, Any]) -> tuple[Path, Result]:
    """The file to write, and what an interrupted run of the same program left in it."""
    for path in sorted(out.glob("*.json"), reverse=True):
        try:
            found = load(path)
        except ResultError:
            continue  # another program's file, or another version's: left alone
        same = ("commit", "dirty", "device", "driver", "cuda", "versions")
        if all(found.header.get(key) == header.get(key) for key in same):
            if found.header.get("finished"):
                continue
            found.header.setdefault("resumed", []).append(header["created"])
            return path, found
    date = datetime.date.today().isoformat()
    stem = f"{date}-{(header['commit'] or 'no-commit')[:9]}"
    path, number = out / f"{stem}.json", 2
    while path.exists():
        path, number = out / f"{stem}-{number}.json", number + 1
    return path, Result({**header, "outcomes": {}, "finished": False})


def _attempt(result: Result, name: str, work: Callable[[], Any]) -> None:
    """Do this part; its failure is recorded and must not cost the parts that follow."""
    result.header["outcomes"].pop(name, None)
    start = time.monotonic()
    try:
        work()
    except Exception as error:
        says = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        seconds = round(time.monotonic() - start, 1)
        result.header["outcomes"][name] = {"status": "failed", "seconds": seconds, "says": says}


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
    end = None  # of the checks; the build comes before their share
    for name, command in commands.items():
        if outcomes.get(name, {}).get("status") == "passed":
            continue
        if name == "gpu_tests" and not result.on_gpu:
            outcomes[name] = {"status": "no GPU", "seconds": 0.0, "says": ""}
        elif name == "build":
            left = deadline - time.monotonic()
            outcomes[name] = preflight.run(command, left * preflight.BUILD_SHARE)
        else:
            end = end or time.monotonic() + PREFLIGHT_SHARE * (deadline - time.monotonic())
            left = end - time.monotonic()
            outcomes[name] = preflight.run(command, left * preflight.SHARES[name])
        save(result, path)
        say(f"{name}: {outcomes[name]['status']}, {outcomes[name]['seconds']} s")


def _measure(
    result: Result, path: Path, options: Options, deadline: float, say: Callable[[str], Any]
) -> None:
    timer = timer_for(torch.device("cuda" if result.on_gpu else "cpu"))
    bench = Bench(timer, _backends(result.on_gpu, options.backends), tiny=options.tiny)
    if options.tiny:
        bench = replace(bench, seconds=0.01)
    result.header["backends"] = bench.backends  # in the order in which "auto" asks them
    work = tasks(bench)
    before = {entry["task"]: entry for entry in result.log}
    # What failed comes last: it may fail again and take the GPU with it.
    work.sort(key=lambda task: before.get(task.name, {}).get("status") == "failed")
    lost = ""
    for number, task in enumerate(work, 1):
        if _is_done(before.get(task.name), bench):
            continue
        left = deadline - CLOSING_SECONDS * (not options.tiny) - time.monotonic()
        if lost and before.get(task.name, {}).get("status") == "failed":
            continue
        if lost:
            entry = {"task": task.name, "status": "not run", "seconds": 0.0, "note": lost}
        else:
            entry = _run_task(task, result, bench, left)
            if entry["status"] != "out of time" and _is_lost(bench):
                lost = f"the GPU was lost in {task.name}; run the same command again to go on"
                entry |= {"status": "failed", "note": f"{entry.get('note', '')} (GPU lost)".strip()}
        result.log = [old for old in result.log if old["task"] != task.name] + [entry]
        save(result, path)
        if entry["status"] != "not run":
            say(f"[{number}/{len(work)}] {task.name}: {entry['status']}, {entry['seconds']} s")
    if lost:
        raise RuntimeError(lost)


def _is_done(entry: dict[str, Any] | None, bench: Bench) -> bool:
    """Whether this run asks for nothing of a task that an earlier one did not measure."""
    if entry is None or entry["status"] != "done":
        return False
    return set(bench.backends) <= set(entry.get("backends", ()))


def _is_lost(bench: Bench) -> bool:
    """Whether the GPU answers nothing any more in this process, as after an illegal access."""
    if not bench.on_gpu:
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _run_task(task: Task, result: Result, bench: Bench, left: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"task": task.name, "status": "done", "seconds": 0.0}
    if left < task.seconds:
        return {**entry, "status": "out of time"}
    start = time.monotonic()
    try:
        broken = nothing_timed(task.run(result, bench))
        if broken is not None:
            entry |= {"status": "failed", "note": broken}
    except Exception as error:  # a task that fails must not lose what the others measure
        entry |= {"status": "failed", "note": f"{type(error).__name__}: {error}"[:300]}
    seconds = round(time.monotonic() - start, 1)
    return {**entry, "seconds": seconds, "backends": bench.backends}


def _backends(on_gpu: bool, wanted: tuple[str, ...] = ()) -> list[str]:
    """The backends that are timed: those named, which must run here, or all that do."""
    reasons = {name: get(name).unavailable_reason() for name in NAMES}
    for name in wanted:
        if reasons[name]:
            raise RuntimeError(f"backend {name} cannot run here: {reasons[name]}")
    if wanted:
        return [name for name in NAMES if name in wanted]
    fused = [name for name in NAMES if name != "reference" and not reasons[name]]
    return fused if on_gpu and fused else ["reference"]


def _close(result: Result, path: Path, device: torch.device, no_pictures: str | None) -> None:
    """The second copy and clocks, which tell a steady run; summary and pictures."""

    def copy_again() -> None:
        timer = timer_for(device)
        if isinstance(timer, CudaTimer):
            with timer.session():
                after = calibration.copy_bandwidth(timer, 0.3)
            result.header["calibration"]["copy_bandwidth_after"] = after
            result.header["clocks_after"] = environment.clocks(device)

    def draw() -> None:
        if no_pictures:
            raise RuntimeError(no_pictures)
        _, problems = pictures.draw(result, path)
        if problems:
            raise RuntimeError("; ".join(problems))

    def summarise() -> None:
        path.with_suffix(".md").write_text(summary.summary(result), encoding="utf-8")

    _attempt(result, "second copy", copy_again)
    result.header["finished"] = all(entry["status"] == "done" for entry in result.log)
    save(result, path)
    _attempt(result, "pictures", draw)
    _attempt(result, "summary", summarise)
    save(result, path)


def _outputs(path: Path) -> list[Path]:
    return [found for found in path.parent.iterdir() if found.name.startswith(path.stem)]
