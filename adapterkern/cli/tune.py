"""`adapterkern tune`: searches launch configurations on the present GPU, for later runs to use."""

import argparse
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Searches tile sizes, warps, pipeline stages and slices of the Triton kernels on the present GPU, for
the given shapes, and writes them to a file that later runs look up by the nearest shape. A search
compiles hundreds of kernels: minutes a shape. Calls never search by themselves.
"""

EPILOG = """\
examples:
  adapterkern tune --preset gpt2-medium --tokens 2048 16384
  adapterkern tune --hidden-size 1024 --bottleneck-size 64 --tokens 16384 --dtype bf16
  adapterkern tune --out h200.json          write elsewhere than into the package

exit codes: 0 success, 1 nothing could be searched, 2 wrong usage or no GPU
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
    parser.add_argument("--limit", type=int, metavar="N", help="candidates a shape (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: <gpu>.json inside the package"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search, write, print what changed."""
    import torch

    from adapterkern.backends import get
    from adapterkern.backends.triton import tuned
    from adapterkern.bench import environment
    from adapterkern.bench.results import unwritable

    try:
        cases = _cases(arguments)
    except ValueError as error:
        return _refuse(str(error))
    reason = get("triton").unavailable_reason()
    if reason is None and not torch.cuda.is_available():
        reason = "no CUDA device"
    if reason is not None:
        return _refuse(f"a search needs the triton backend on a GPU: {reason}")
    gpu = torch.cuda.get_device_name()
    path = arguments.out or tuned.FOLDER / f"{environment.folder_name(gpu)}.json"
    problem = unwritable(path.parent)
    if problem:
        return _refuse(f"{problem}; name a file with --out")
    found = _search_all(cases, arguments.limit)
    if not found:
        return 1
    _write(path, gpu, found)
    changed = sum(outcome.changed for outcome in found)
    print(f"{changed} of {len(found)} configurations changed; written to {path}")
    return 0


def _cases(arguments: argparse.Namespace) -> list:
    """Forward cases of every shape and number of tokens.

    Raises:
        ValueError: half of a shape, an unknown preset or dtype, or a size below 1.
    """
    from adapterkern.bench import tune
    from adapterkern.bench.cases import grid, preset_shapes

    hidden, bottleneck = arguments.hidden_size, arguments.bottleneck_size
    if (hidden is None) != (bottleneck is None):
        raise ValueError("--hidden-size and --bottleneck-size go together.")
    if hidden is not None:
        shapes = [(h, r) for h in hidden for r in bottleneck]
    else:
        shapes = preset_shapes(arguments.preset) if arguments.preset else list(tune.SHAPES)
    return grid(shapes, arguments.tokens or tune.TOKENS, ("forward",), arguments.dtype)


def _search_all(cases: list, limit: int | None) -> list:
    """An outcome for each case and kind of plan; a case that fails is reported and left out."""
    from dataclasses import replace

    import torch

    from adapterkern.backends.base import allow_tf32
    from adapterkern.bench import tune
    from adapterkern.bench.timing import CudaTimer

    device = _device()
    timer = CudaTimer(torch.device("cuda"))
    found = []
    for case in cases:
        for kind, mode in (("tokens", "forward"), ("weights", "backward")):
            timed = replace(case, mode=mode)
            problem = tune.problem_of(timed, ieee=not allow_tf32())
            try:
                outcome = tune.search(
                    timed, problem, device, kind, timer, progress=_progress, limit=limit
                )
            except Exception as error:  # out of memory on one shape must not lose the others
                print(f"{timed} {kind}: not searched, {type(error).__name__}: {error}")
                continue
            print(outcome, flush=True)
            found.append(outcome)
    return found


def _device() -> Any:
    """The present GPU as launch configurations see it."""
    import torch

    from adapterkern.backends.triton.launch_config import Device

    properties: Any = torch.cuda.get_device_properties(0)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def _write(path: Path, gpu: str, found: list) -> None:
    from adapterkern.backends.triton import tuned
    from adapterkern.bench import tune

    old = tuned.load(path)[1] if path.exists() else []
    tuned.save(path, gpu, _device(), tune.merge(old, (outcome.entry for outcome in found)))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def _refuse(problem: str) -> int:
    print(f"adapterkern tune: {problem}", file=sys.stderr)
    return 2
