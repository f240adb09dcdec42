"""Entry point of the `adapterkern` command: finds the command and imports that one module alone."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from adapterkern import __version__, dispatch
from adapterkern.cli import interrupts

# name -> (module, one line of help). The module offers add_parser(subparsers), whose parser sets
# the default `run`: a function of the parsed arguments that returns the exit code.
COMMANDS = {
    "info": ("adapterkern.cli.info", "whether adapters run here, with what, and what is amiss"),
    "check": ("adapterkern.cli.check", "does this machine compute right? all against float64"),
    "bench": (
        "adapterkern.cli.bench",
        "what an adapter costs, against plain layers and the limits",
    ),
    "demo": ("adapterkern.cli.demo", "train adapters in a real model on real text, and report"),
    "tune": ("adapterkern.cli.tune", "search launch configurations on the present GPU"),
}

EPILOG = """\
examples:
  adapterkern info           first of all: do adapters run here, and with what?
  adapterkern check --quick  does this machine compute right?
  adapterkern demo --quick   the whole path, in under a minute
  adapterkern check --help   options, examples and exit codes of one command

exit codes:
  0 success, 1 a check failed, 2 wrong usage,
  128 + N ended by signal N, such as 130 by Ctrl-C
"""


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser with every command listed, of which only `chosen` is imported."""
    parser = argparse.ArgumentParser(
        prog="adapterkern",
        description="Fused bottleneck adapters for PyTorch: inspect, verify and try them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"adapterkern {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default) and return its exit code.

    Where a signal ends it, that is 128 + its number. What the command has to say on that it gives
    to `interrupts.told`; where it says nothing, one line tells the signal.
    """
    with interrupts.handled(ends_process=argv is None):
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt as interrupt:
            return interrupts.report(interrupt)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _run(words: list[str]) -> int:
    try:
        dispatch.check_environment()
    except ValueError as error:
        print(f"adapterkern: error: {error}", file=sys.stderr)
        return 2
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser(chosen)
    arguments = parser.parse_args(words)
    if not hasattr(arguments, "run"):
        parser.print_help(sys.stderr)
        return 2
    code = arguments.run(arguments)
    sys.stdout.flush()
    return code
