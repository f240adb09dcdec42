"""Entry point of the `adapterkern` command: finds the command and imports that one module alone."""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from adapterkern import __version__, dispatch

# name -> (module, one line of help). The module offers add_parser(subparsers), whose parser sets
# the default `run`: a function of the parsed arguments that returns the exit code.
COMMANDS = {
    "info": ("adapterkern.cli.info", "what is installed, what can run here, and what is amiss"),
    "check": ("adapterkern.cli.check", "compare every backend that can run here with float64"),
    "bench": (
        "adapterkern.cli.bench",
        "what an adapter costs, against plain layers and the limits",
    ),
    "demo": ("adapterkern.cli.demo", "train adapters in a real model on real text, and report"),
    "tune": ("adapterkern.cli.tune", "search launch configurations on the present GPU"),
}

EPILOG = """\
examples:
  adapterkern info           versions, GPUs, and which backend would run
  adapterkern check          is the arithmetic right on this machine?
  adapterkern demo --quick   the whole path, in under a minute
  adapterkern check --help   options, examples and exit codes of one command

exit codes: 0 success, 1 a check failed, 2 wrong usage, 128 + N ended by signal N
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
    """Run one command line (`sys.argv` by default) and return its exit code."""
    try:
        dispatch.check_environment()
    except ValueError as error:
        print(f"adapterkern: error: {error}", file=sys.stderr)
        return 2
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser(chosen)
    arguments = parser.parse_args(words)
    if not hasattr(arguments, "run"):
        parser.print_help(sys.stderr)
        return 2
    try:
        with _interruptible():
            code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        return 128 + next(iter(interrupt.args), signal.SIGINT)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does: with the processes that it started.

    A signal that the caller ignores, as nohup does, stays so.
    """

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    mine = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
