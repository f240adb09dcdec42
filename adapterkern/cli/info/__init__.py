"""`adapterkern info`: whether adapters run here and with what, what is amiss, and all details.

Every probe is guarded by itself: a broken part of the installation becomes a line of the report.
"""

import argparse
import json
from collections.abc import Callable

from adapterkern.cli.info.probes import PROBES
from adapterkern.cli.info.problems import find_problems
from adapterkern.cli.info.summary import summarise
from adapterkern.cli.info.text import render

DESCRIPTION = """\
Tells in its first line whether adapters run on this machine, and with what.
Then what is amiss, each with its cure. Then the details: versions, the backend
that each dtype would use, why a backend cannot run, GPUs and driver, for which
GPUs the CUDA extension was built or why it was not, what Triton needs to start
a kernel, and the environment variables in force.
"""

EPILOG = """\
examples:
  adapterkern info
  adapterkern info --json                   the same, with every field
  ADAPTERKERN_BACKEND=triton adapterkern info
                                            with that variable in force

exit codes:
  0  the report was made, whatever it says
  2  wrong usage
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
    """The report: "summary", one entry per probe, {"error": text} where it failed, "problems"."""
    report = {name: _guarded(probe) for name, probe in PROBES.items()}
    return {"summary": summarise(report), **report, "problems": find_problems(report)}


def _guarded(probe: Callable[[], dict]) -> dict:
    try:
        return probe()
    except Exception as error:  # whatever is broken, the other probes still tell their part
        return {"error": f"{type(error).__name__}: {error}"}
