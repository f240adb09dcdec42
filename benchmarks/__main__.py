"""`python -m benchmarks`: the report of this machine, and the README's performance section."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """\
examples:
  python -m benchmarks report --out benchmarks/results/nvidia-h200    ten minutes on a GPU
  python -m benchmarks report --out /tmp/report --minutes 1 --skip-build
  python -m benchmarks readme                                         after committing a result

A report that was interrupted continues where it was when it is run again with the same folder.
Where a kernel takes the GPU down, --backend leaves its backend out.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures everything on this machine, in order of worth, within a time.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    report = commands.add_parser("report", help="measure, and write JSON, pictures and a summary")
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    report.add_argument("--minutes", type=_positive, default=9.0, help="in all (default: 9)")
    report.add_argument("--skip-build", action="store_true", help="do not install the tree first")
    report.add_argument("--skip-check", action="store_true", help="no parity check, no GPU tests")
    report.add_argument("--tiny", action="store_true", help="sizes that only show that it works")
    report.add_argument(
        "--backend", nargs="+", default=[], metavar="NAME", help="time these alone (default: all)"
    )
    report.add_argument("--commit", metavar="HASH", help="of the tree, where it has no .git")
    report.set_defaults(run=_report)
    readme = commands.add_parser("readme", help="write the README's performance section")
    readme.set_defaults(run=_readme)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; run it again with the same folder to continue", file=sys.stderr)
        return 130


def _report(arguments: argparse.Namespace) -> int:
    from adapterkern.bench.results import unwritable

    problem = unwritable(arguments.out)
    if problem:
        print(f"python -m benchmarks: {problem}; choose a folder with --out", file=sys.stderr)
        return 2
    from adapterkern.backends import NAMES
    from benchmarks import report

    unknown = [name for name in arguments.backend if name not in NAMES]
    if unknown:
        known = ", ".join(NAMES)
        print(
            f"python -m benchmarks: unknown backend {unknown[0]!r}; known: {known}", file=sys.stderr
        )
        return 2
    options = report.Options(
        arguments.out,
        arguments.minutes,
        build=not arguments.skip_build,
        check=not arguments.skip_check,
        tiny=arguments.tiny,
        backends=tuple(arguments.backend),
        commit=arguments.commit,
    )
    report.run(options, lambda text: print(text, flush=True))
    return 0


def _readme(_arguments: argparse.Namespace) -> int:
    from adapterkern.bench.results import ResultError
    from benchmarks import readme

    try:
        path = readme.write()
    except (ResultError, readme.MarkerError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    print(f"README.md: {path if path else 'no GPU result yet'}")
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
