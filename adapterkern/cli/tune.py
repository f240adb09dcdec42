"""`adapterkern tune`: searches launch configurations on the present GPU, for later runs to use."""

import argparse
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Searches tile sizes, warps, pipeline stages and slices of the Triton kernels on the present GPU, for
the given shapes, and writes them to a file in your cache folder, where later calls look up the
nearest shape (`adapterkern info` shows the file; delete it to undo the search). Processes compile
the candidates ahead of the one that times them. The most valuable searches come first, each result
is in the file once the next search was timed, and what the file has is not searched again, so that
a run can be stopped at any time and repeated. At the end, shapes that were not searched are timed
with and without the entries; a kind of entry that makes one of them more than 2 % slower is
dropped. Calls never search by themselves.
"""

EPILOG = """\
examples:
  adapterkern tune                          the 25 searches that most models gain from
  adapterkern tune --preset gpt2-medium --tokens 2048 16384
  adapterkern tune --hidden-size 1024 --bottleneck-size 64 --tokens 16384 --dtype bf16
  adapterkern tune --minutes 9              repeat it, and it goes on where it was
  adapterkern tune --out h200.json          write elsewhere than into the cache folder

exit codes: 0 success, 1 nothing could be searched or the GPU was lost, 2 wrong usage or no GPU,
130 interrupted
"""
# The held-out shapes at the end get this share of the time: about 2 s for each of ten.
HELD_OUT_SHARE, HELD_OUT_SECONDS = 0.1, 30.0
AHEAD = 3  # searches whose entries are compiled while one is timed


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "tune",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--hidden-size", **sizes, help="H, with --bottleneck-size")
    parser.add_argument("--bottleneck-size", **sizes, help="R, with --hidden-size")
    parser.add_argument("--tokens", **sizes, help="T, the rows of x")
    parser.add_argument("--preset", nargs="+", metavar="MODEL", help="the widths of these models")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], help="default: bf16")
    parser.add_argument("--limit", type=int, metavar="N", help="candidates a search (default: all)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        metavar="M",
        help="for everything; no search begins in the last tenth, at most half a minute "
        "(default: 30)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 1) - 2),
        metavar="N",
        help="processes that compile (default: %(default)s, the CPUs but two)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: <gpu>.json in your cache folder"
    )
    parser.set_defaults(run=run)


@dataclass
class _File:
    """The file that a run writes, and what is in it."""

    path: Path
    gpu: str
    device: Any
    entries: list
    held_out: Sequence[Any] = ()

    def save(self) -> None:
        from adapterkern.backends.triton import tuned

        tuned.save(self.path, self.gpu, self.device, self.entries, self.held_out)


def run(arguments: argparse.Namespace) -> int:
    """Search, write each outcome, print what changed, and drop what costs other shapes."""
    import torch

    from adapterkern.backends import get
    from adapterkern.backends.triton import tuned
    from adapterkern.bench import environment

    try:
        _searches(arguments, [])
    except ValueError as error:
        return _refuse(str(error))
    reason = get("triton").unavailable_reason()
    if reason is None and not torch.cuda.is_available():
        reason = "no CUDA device"
    if reason is not None:
        return _refuse(
            f"nothing to tune here: it searches for the Triton kernels on a GPU ({reason}).\n"
            "  hint: run it on the machine with the GPU; everything works without it too"
        )
    gpu = torch.cuda.get_device_name()
    path = arguments.out or tuned.FOLDERS[0] / f"{environment.folder_name(gpu)}.json"
    try:
        file = _open(path, gpu, tuned.device_of(0))
        work = _searches(arguments, file.entries)
    except ValueError as error:
        return _refuse(str(error))
    _say(
        f"{gpu}: {len(work)} searches, for {arguments.minutes:g} minutes, "
        f"{arguments.jobs} processes compiling, into {path}"
    )
    return _run(arguments, file, work)


def _run(arguments: argparse.Namespace, file: _File, work: list) -> int:
    import torch

    from adapterkern.bench.compiling import Compilers
    from adapterkern.bench.results import LostDeviceError
    from adapterkern.bench.timing import CudaTimer

    seconds = 60 * arguments.minutes
    deadline = time.monotonic() + seconds - min(HELD_OUT_SHARE * seconds, HELD_OUT_SECONDS)
    found: list = []
    code = 0
    major, minor = torch.cuda.get_device_capability(0)
    with Compilers(arguments.jobs, 10 * major + minor, file.device) as compilers:
        try:
            timer = CudaTimer(torch.device("cuda"))
            _search_all(work, file, compilers, timer, deadline, arguments.limit, found)
            if found:
                _drop_what_costs(file, compilers, timer)
        except KeyboardInterrupt:
            _say("interrupted; the held-out shapes were not timed to the end")
            code = 130
        except LostDeviceError as error:
            _say(f"{error}\nended; the held-out shapes were not timed to the end")
            code = 1
        except OSError as error:
            code = _refuse(f"cannot write {file.path}: {error}")
    changed = sum(outcome.changed for outcome in found)
    where = f"; written to {file.path}" if found else ""
    _say(f"{changed} of {len(found)} configurations changed{where}")
    return code or (1 if work and not found else 0)


def _search_all(
    work: list, file: _File, compilers: Any, timer: Any, deadline: float, limit: int, found: list
) -> None:
    """Run search by search within the time. One is settled when the next was timed, its proofs
    being compiled meanwhile; one that fails is reported and left out.
    """
    from adapterkern.bench import search, tune
    from adapterkern.bench.results import LostDeviceError

    def keep(ranked: Any) -> None:
        outcome = search.settle(ranked, file.device, compilers, file.gpu)
        file.entries = tune.merge(file.entries, [outcome.entry])
        file.save()
        found.append(outcome)
        _say(str(outcome))

    queued: deque = deque()
    timed: Any = None
    try:
        for number in range(len(work)):
            if time.monotonic() >= deadline:
                _say(f"out of time: {len(work) - number} searches are left for another run")
                break
            for one in work[number + len(queued) : number + AHEAD]:
                queued.append(search.enqueue(one, file.device, compilers, limit))
            one = queued.popleft()
            try:
                ranked = search.rank(one, timer, file.device, compilers, progress=_progress)
            except LostDeviceError:
                raise
            except Exception as error:  # out of memory on one shape must not lose the others
                _say(f"{one.search}: not searched, {type(error).__name__}: {error}")
                continue
            before, timed = timed, ranked
            if before is not None:
                keep(before)
    finally:
        if timed is not None:
            keep(timed)


def _drop_what_costs(file: _File, compilers: Any, timer: Any) -> None:
    """Time the held-out shapes before and after, and drop the classes of entries that lose."""
    from adapterkern.backends.base import allow_tf32
    from adapterkern.bench import search
    from adapterkern.bench.results import LostDeviceError

    rows = []
    for trial in search.trials(file.entries, not allow_tf32(), file.device, compilers):
        try:
            row = search.judge(trial, timer, progress=_progress)
        except LostDeviceError:
            raise
        except Exception as error:  # out of memory on one shape says nothing about the entries
            _say(f"held out {trial.case} {trial.kind}: not timed, {type(error).__name__}: {error}")
            continue
        rows.append(row)
        times = f"{row.before_us:.1f} us to {row.after_us:.1f} us"
        _say(f"held out {row.kind} {row.case}: {row.problem or times}")
    losers = [row for row in rows if search.loses(row)]
    kept = search.without(file.entries, losers)
    for kind, ieee, wide in dict.fromkeys((row.kind, row.ieee, row.wide) for row in losers):
        names = {(True, True): "float32", (False, True): "float32 or TF32 tiles"}
        count = sum((e.kind, *e.problem[3:]) == (kind, ieee, wide) for e in file.entries)
        _say(
            f"dropped {count} entries for {kind} in {names.get((ieee, wide), 'half precision')}: "
            "they cost a held-out shape more than 2 %, or cannot run it"
        )
    file.entries, file.held_out = kept, rows
    file.save()


def _open(path: Path, gpu: str, device: Any) -> _File:
    """Return the file that the search adds to.

    Raises:
        ValueError: it cannot be written or read, or was searched on another GPU.
    """
    from adapterkern.backends.triton import tuned
    from adapterkern.bench.results import unwritable

    problem = f"{path} is a folder" if path.is_dir() else unwritable(path.parent)
    if problem:
        raise ValueError(f"{problem}; name a file with --out")
    if not path.exists():
        return _File(path, gpu, device, [])
    try:
        old = tuned.load(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if (old.gpu, old.device) != (gpu, device):
        raise ValueError(
            f"{path} was searched on {old.gpu} ({old.device.num_sms} SMs), this is {gpu} "
            f"({device.num_sms} SMs).\n  hint: name another file with --out"
        )
    return _File(path, gpu, device, old.entries, old.held_out)


def _searches(arguments: argparse.Namespace, done: list) -> list:
    """Return what the command line asks for and `done` does not hold.

    Raises:
        ValueError: half of a shape, an unknown preset or dtype, a size below 1, no time, no
            process.
    """
    from adapterkern.backends.base import allow_tf32
    from adapterkern.bench import tune
    from adapterkern.bench.cases import preset_shapes

    if not 0 < arguments.minutes < math.inf:
        raise ValueError(f"--minutes must be above 0 and finite, got {arguments.minutes:g}.")
    for option in ("limit", "jobs"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}.")
    hidden, bottleneck = arguments.hidden_size, arguments.bottleneck_size
    if (hidden is None) != (bottleneck is None):
        raise ValueError("--hidden-size and --bottleneck-size go together.")
    shapes: Sequence[tuple[int, int]] | None = None
    if hidden is not None:
        shapes = [(h, r) for h in hidden for r in bottleneck]
    elif arguments.preset:
        shapes = preset_shapes(arguments.preset)
    asked = tune.asked_for(shapes, arguments.tokens)
    return tune.searches(asked, arguments.dtype, not allow_tf32(), done)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, flush=True)


def _refuse(problem: str) -> int:
    print(f"adapterkern tune: {problem}", file=sys.stderr, flush=True)
    return 2
