"""`adapterkern info`: versions, extension, driver, GPUs, Triton's needs, and what is amiss.

Every probe is guarded by itself: a broken part of the installation becomes a line of the report.
"""

import argparse
import json
from collections.abc import Callable

from adapterkern.cli.info.probes import PROBES
from adapterkern.cli.info.problems import find_problems
from adapterkern.cli.info.text import render

DESCRIPTION = """\
Shows what an installation consists of and what would run on this machine: versions and whether they
fit together, the CUDA extension or why it is missing, driver and GPUs, what Triton needs to start a
kernel, and the backend that each dtype would use. Ends with a list of problems and their cures.
"""

EPILOG = """\
examples:
  adapterkern info
  adapterkern info --json | python -m json.tool
  ADAPTERKERN_BACKEND=triton adapterkern info   the choice with that variable in force

exit codes: 0 the report was made, whatever it says; 2 wrong usage
"""


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "info",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; always 0."""
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0


def collect() -> dict:
    """The report: one entry per probe, {"error": text} where a probe failed, and "problems"."""
    report = {name: _guarded(probe) for name, probe in PROBES.items()}
    return {**report, "problems": find_problems(report)}


def _guarded(probe: Callable[[], dict]) -> dict:
    try:
        return probe()
    except Exception as error:  # whatever is broken, the other probes still tell their part
        return {"error": f"{type(error).__name__}: {error}"}
