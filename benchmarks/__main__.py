"""`python -m benchmarks`: a run on a GPU, what travels there, and what is drawn of it here."""

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import stages

EPILOG = """\
On a machine with the repository:
  python -m benchmarks pack                     extension, wheels and commit into .gpu
On the GPU machine, under nine minutes each, into a folder of its own:
  python -m benchmarks gpu --stage verify --out DIR     is it right, and the headline numbers
  python -m benchmarks gpu --stage report --out DIR     what it costs beside other implementations
  python -m benchmarks gpu --stage tune --out DIR       how it should be launched
  python -m benchmarks gpu --stage diagnose --case ID --kernel REGEX --out DIR
Back again:
  python -m benchmarks merge DIR [DIR ...]      into benchmarks/results/<gpu>/<date>-<commit>
  python -m benchmarks readme                   pictures, tables, README and docs/benchmarks.md
Without a GPU:
  python -m benchmarks model                    what the launch plans should take, by their bytes
"""
DEFAULT = stages.Wanted()
BACKENDS, MODES = ("cuda", "triton"), ("forward", "backward", "step")
FAULTS = ("hang", "die", "lose")
CARDS = ("h200", "h100", "a100")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Turns minutes of a GPU into numbers, and these into documents.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_gpu(commands.add_parser("gpu", help="run a stage, whatever hangs or dies"))
    pack = commands.add_parser("pack", help="prepare what a GPU machine without a network lacks")
    pack.add_argument("--python", metavar="PATH", help="to build for (default: a Python 3.12)")
    pack.add_argument(
        "--triton", metavar="PATH",
        help="a Python with the GPU machine's torch and triton: compile Triton's kernels too",
    )  # fmt: skip
    pack.add_argument("--archs", default="sm_90a", help="default: sm_90a")
    pack.set_defaults(run=_pack)
    merge = commands.add_parser("merge", help="combine runs of one commit on one kind of GPU")
    merge.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="what a run wrote")
    merge.add_argument("--into", type=Path, metavar="DIR", help="default: benchmarks/results")
    merge.set_defaults(run=_merge)
    readme = commands.add_parser("readme", help="write what README and docs say of speed")
    readme.set_defaults(run=_readme)
    _add_model(commands.add_parser("model", help="predict each plan's time from its bytes"))
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_gpu(gpu: argparse.ArgumentParser) -> None:
    gpu.add_argument("--stage", choices=stages.NAMES, required=True, help="what to do")
    gpu.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a folder without an earlier run"
    )
    gpu.add_argument(
        "--seconds", type=_positive, default=stages.SECONDS, help="in all (default: %(default)g)"
    )
    gpu.add_argument("--dry", action="store_true", help="the same on the CPU, a few seconds a step")
    gpu.add_argument(
        "--fault",
        type=_fault,
        action="append",
        default=[],
        metavar="STEP=KIND",
        help="with --dry: its worker does this in place of the first task (hang, die or lose)",
    )
    named = gpu.add_argument_group("of --stage diagnose")
    named.add_argument(
        "--backend", choices=BACKENDS, default=DEFAULT.backend, help="default: %(default)s"
    )
    named.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="a parity case to check",
    )
    named.add_argument("--kernel", default=DEFAULT.kernel, metavar="REGEX", help="for ncu")
    named.add_argument("--tokens", type=_count, default=DEFAULT.tokens, help="of the profiled call")
    named.add_argument("--hidden-size", type=_count, default=DEFAULT.hidden_size, help="likewise")
    named.add_argument(
        "--bottleneck-size", type=_count, default=DEFAULT.bottleneck_size, help="likewise"
    )
    named.add_argument(
        "--mode", choices=MODES, default=DEFAULT.mode, help="likewise (default: %(default)s)"
    )
    gpu.set_defaults(run=_gpu)


def _add_model(model: argparse.ArgumentParser) -> None:
    model.add_argument(
        "--backend", choices=BACKENDS, nargs="+", default=BACKENDS, help="default: both"
    )
    model.add_argument("--card", choices=CARDS, default=CARDS[0], help="default: %(default)s")
    model.add_argument("--tokens", type=_count, nargs="+", help="default: docs/performance.md's")
    model.add_argument("--hidden-size", type=_count, nargs="+", help="likewise")
    model.add_argument("--bottleneck-size", type=_count, nargs="+", help="likewise")
    model.add_argument("--kernels", action="store_true", help="every kernel with its bounds in us")
    model.set_defaults(run=_model)


def _gpu(arguments: argparse.Namespace) -> int:
    from benchmarks.gpu import run
    from benchmarks.gpu.output import FolderError
    from benchmarks.gpu.pack import PackError

    if arguments.fault and not arguments.dry:
        return _refuse("--fault goes with --dry.")
    measured = [s.name for s in stages.steps(arguments.stage) if isinstance(s, stages.Measure)]
    for step, _ in arguments.fault:
        if step not in measured:
            known = ", ".join(measured) or "none"
            return _refuse(f"--fault {step}: no such step has a worker in this stage ({known}).")
    wanted = stages.Wanted(
        arguments.backend,
        tuple(arguments.case),
        arguments.kernel,
        arguments.tokens,
        arguments.hidden_size,
        arguments.bottleneck_size,
        arguments.mode,
    )
    options = run.Options(
        arguments.stage,
        arguments.out.absolute(),
        arguments.seconds,
        arguments.dry,
        dict(arguments.fault),
        wanted,
    )
    try:
        return run.run(options, lambda text: print(text, flush=True))
    except (run.NoCommitError, FolderError, PackError) as error:
        return _refuse(str(error))


def _pack(arguments: argparse.Namespace) -> int:
    from benchmarks.gpu import pack

    try:
        python = [arguments.python] if arguments.python else pack.default_python()
        triton = [arguments.triton] if arguments.triton else None
        made = pack.create(
            python, arguments.archs, lambda text: print(text, flush=True), triton=triton
        )
    except pack.PackError as error:
        return _refuse(str(error))
    command = ["python3", "-m", "benchmarks", "gpu", "--stage", "verify", "--out"]
    print(f"carry {made.folder.name} along with the tree, and run there, in the tree:")
    print(f'  {shlex.join(command)} "$OUT"')
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from adapterkern.bench.results import ResultError
    from benchmarks import readme, records

    try:
        folder, count = records.merge(arguments.runs, arguments.into or readme.RESULTS)
    except (ResultError, OSError) as error:
        return _refuse(str(error))
    print(f"{folder}: {count} runs")
    return 0


def _readme(_arguments: argparse.Namespace) -> int:
    from adapterkern.bench.results import ResultError
    from benchmarks import readme

    try:
        path = readme.write()
    except (ResultError, readme.MarkerError) as error:
        return _refuse(str(error))
    print(f"README.md, {readme.GOALS}, {readme.MODEL}: {path if path else 'no GPU result yet'}")
    return 0


def _model(arguments: argparse.Namespace) -> int:
    from benchmarks import block_model, many_model, model

    sizes = arguments.tokens, arguments.hidden_size, arguments.bottleneck_size
    columns = zip(*model.SHAPES, strict=True)
    wanted = [given or sorted(set(known)) for given, known in zip(sizes, columns, strict=True)]
    shapes = list(itertools.product(*wanted)) if any(sizes) else model.SHAPES
    card = model.CARDS[arguments.card]
    try:
        rows = list(model.predictions(card, shapes, arguments.backend))
    except RuntimeError as error:  # the CUDA plans read sizes that the extension tells
        return _refuse(f"{error}\n  hint: --backend triton needs no extension")
    print(model.table(rows))
    if arguments.kernels:
        print("\n" + model.kernel_table(rows, card))
    if not any(sizes):
        print("\n" + block_model.table(list(block_model.overheads(card))))
        print("\n" + many_model.table(list(many_model.predictions(card, arguments.backend))))
    return 0


def _refuse(problem: str) -> int:
    print(f"python -m benchmarks: {problem}", file=sys.stderr)
    return 2


def _fault(text: str) -> tuple[str, str]:
    step, _, kind = text.partition("=")
    if kind not in FAULTS:
        raise argparse.ArgumentTypeError(f"must be STEP={'|'.join(FAULTS)}, got {text}")
    return step, kind


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
