"""`adapterkern tune`: searches launch configurations on the present GPU, for later runs to use."""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Searches tile sizes, warps, pipeline stages and slices of the Triton kernels on the present GPU, for
the given shapes, and writes them to a file that later runs look up by the nearest shape. A search
compiles hundreds of kernels: minutes a shape and number of tokens. The most valuable come first,
each result is in the file at once, and what the file has is not searched again, so that a run can
be stopped at any time and repeated. Calls never search by themselves.
"""

EPILOG = """\
examples:
  adapterkern tune --preset gpt2-medium --tokens 2048 16384
  adapterkern tune --hidden-size 1024 --bottleneck-size 64 --tokens 16384 --dtype bf16
  adapterkern tune --minutes 9              repeat it, and it goes on where it was
  adapterkern tune --out h200.json          write elsewhere than into the package

exit codes: 0 success, 1 nothing could be searched, 2 wrong usage or no GPU, 130 interrupted
"""


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
        help="begin no search after M > 0 minutes (default: 30)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: <gpu>.json inside the package"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search, write each outcome, print what changed."""
    import torch

    from adapterkern.backends import get
    from adapterkern.backends.triton import tuned
    from adapterkern.bench import environment, tune

    try:
        _searches(arguments, [])
    except ValueError as error:
        return _refuse(str(error))
    reason = get("triton").unavailable_reason()
    if reason is None and not torch.cuda.is_available():
        reason = "no CUDA device"
    if reason is not None:
        return _refuse(f"a search needs the triton backend on a GPU: {reason}")
    gpu = torch.cuda.get_device_name()
    device = tuned.device_of(0)
    path = arguments.out or tuned.FOLDER / f"{environment.folder_name(gpu)}.json"
    try:
        entries = _entries(path, gpu, device)
        work = _searches(arguments, entries)
    except ValueError as error:
        return _refuse(str(error))
    print(f"{gpu}: {len(work)} searches, for {arguments.minutes:g} minutes, into {path}")
    found, code = [], 0
    try:
        for outcome in _outcomes(work, device, arguments):
            entries = tune.merge(entries, [outcome.entry])
            tuned.save(path, gpu, device, entries)
            found.append(outcome)
    except KeyboardInterrupt:
        print("interrupted")
        code = 130
    except OSError as error:
        code = _refuse(f"cannot write {path}: {error}")
    changed = sum(outcome.changed for outcome in found)
    where = f"; written to {path}" if found else ""
    print(f"{changed} of {len(found)} configurations changed{where}")
    return code or (1 if work and not found else 0)


def _entries(path: Path, gpu: str, device: Any) -> list:
    """The entries of the file that the search adds to.

    Raises:
        ValueError: it cannot be written or read, or was searched on another GPU.
    """
    from adapterkern.backends.triton import tuned
    from adapterkern.bench.results import unwritable

    problem = f"{path} is a folder" if path.is_dir() else unwritable(path.parent)
    if problem:
        raise ValueError(f"{problem}; name a file with --out")
    if not path.exists():
        return []
    try:
        old = tuned.load(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if (old.gpu, old.device) != (gpu, device):
        raise ValueError(
            f"{path} was searched on {old.gpu} ({old.device.num_sms} SMs), this is {gpu} "
            f"({device.num_sms} SMs).\n  hint: name another file with --out"
        )
    return old.entries


def _searches(arguments: argparse.Namespace, done: list) -> list:
    """What the command line asks for and `done` does not hold.

    Raises:
        ValueError: half of a shape, an unknown preset or dtype, a size below 1, no time.
    """
    from adapterkern.backends.base import allow_tf32
    from adapterkern.bench import tune
    from adapterkern.bench.cases import preset_shapes

    if not 0 < arguments.minutes < math.inf:
        raise ValueError(f"--minutes must be above 0 and finite, got {arguments.minutes:g}.")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}.")
    hidden, bottleneck = arguments.hidden_size, arguments.bottleneck_size
    if (hidden is None) != (bottleneck is None):
        raise ValueError("--hidden-size and --bottleneck-size go together.")
    if hidden is not None:
        shapes = [(h, r) for h in hidden for r in bottleneck]
    else:
        shapes = preset_shapes(arguments.preset) if arguments.preset else list(tune.SHAPES)
    tokens = arguments.tokens or tune.TOKENS
    return tune.searches(shapes, tokens, arguments.dtype, not allow_tf32(), done)


def _outcomes(work: list, device: Any, arguments: argparse.Namespace) -> Iterator[Any]:
    """Search by search within the time; one that fails is reported and left out."""
    import torch

    from adapterkern.bench import tune
    from adapterkern.bench.timing import CudaTimer

    timer = CudaTimer(torch.device("cuda"))
    deadline = time.monotonic() + 60 * arguments.minutes
    for number, search in enumerate(work):
        if time.monotonic() >= deadline:
            print(f"out of time: {len(work) - number} searches are left for another run")
            return
        case, kind, limit = search.case, search.kind, arguments.limit
        try:
            outcome = tune.search(
                case, search.problem, device, kind, timer, progress=_progress, limit=limit
            )
        except Exception as error:  # out of memory on one shape must not lose the others
            print(f"{case} {kind}: not searched, {type(error).__name__}: {error}")
            continue
        print(outcome, flush=True)
        yield outcome


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def _refuse(problem: str) -> int:
    print(f"adapterkern tune: {problem}", file=sys.stderr)
    return 2
