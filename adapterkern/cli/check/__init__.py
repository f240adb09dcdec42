"""`adapterkern check`: every backend that can run here against float64, forward and gradients.

It runs the cases of `adapterkern.parity`, each backend in its own process, so that none suffers
from what another does to the device. Where there is no GPU, the Triton kernels run in Triton's CPU
interpreter, which is chosen when kernels are defined. One backend alone that needs no such choice
runs in this process.
"""

import argparse
import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Generator

import torch

from adapterkern import _env, parity, testing
from adapterkern.backends import NAMES, get
from adapterkern.cli import interrupts
from adapterkern.cli.check.outcome import Outcome, line_of
from adapterkern.cli.check.process import events_of_a_process
from adapterkern.cli.check.pulse import Pulse
from adapterkern.cli.check.verdict import Limits, first_lines, last_lines, stopped
from adapterkern.cli.check.worker import (
    DTYPES,
    Event,
    backend_event,
    cases_of,
    events,
    shard_of,
)

DESCRIPTION = """\
Does this machine compute right? Compares y, the norm of it, and the gradients
of x, residual, skip, both weights, both biases, the scaling and the norm's
parameters with a computation in float64, for every backend that can run here,
over dtypes (TF32 among them), activations, sizes and all options of a call,
also with Inf and NaN in x and the gradient of y, and with many adapters in a
batch. On a GPU the sizes reach every form of the kernels. Without one the
Triton kernels run in Triton's CPU interpreter, at small sizes.

Prints a line as each case ends: the verdict, the most that a tensor used up of
its tolerance, the seconds, the case. A backend stops where it loses the device
or dies, and the others still run. A table shows, per dtype of the products and
tensor, the case that came closest to its tolerance. The last lines say whether
this machine computes right, and what was not checked.

The error is rms(out - float64) / rms(float64). The tolerance is twice
(gradients: three times) the error that plain PyTorch operations make in the
same dtype on the same device, and at least one rounding of the output.
"""

EPILOG = """\
examples:
  adapterkern check                 minutes on a CPU: the interpreter is slow
  adapterkern check --quick         every dtype and activation, once
  adapterkern check --backend triton --dtype bf16 --full
  adapterkern check --backend cuda --case 'bf16-*-nonfinite' --case '*R136*'
  adapterkern check --shard 2/14    of every 14 cases the second, for 14
                                    processes at once
  adapterkern check --json | tail -n 1
                                    one JSON object a line; the last has the
                                    verdict

exit codes:
  0        every comparison is within its tolerance
  1        a miss, a backend that raised, died or lost the device, or a backend
           named with --backend that cannot run here
  2        wrong usage
  128 + N  ended by signal N, such as 130 by Ctrl-C; what was done until then is
           told on stderr
"""

_EXAMPLES = 3  # case ids in an error


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "check",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend", action="append", choices=NAMES, help="only this one (may be repeated)"
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick",
        action="store_const",
        const="quick",
        dest="level",
        help="every dtype and activation, once",
    )
    level.add_argument(
        "--full",
        action="store_const",
        const="full",
        dest="level",
        help="every activation at every size, every option in every dtype (minutes)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"only this one (may be repeated): {', '.join(parity.SHORT_NAMES.values())}; "
        "fp32 brings TF32",
    )
    parser.add_argument(
        "--case",
        action="append",
        metavar="PATTERN",
        help="only cases whose id fits this shell pattern (may be repeated)",
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only the cases I, I + N, I + 2 N, ..."
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object a line, in place of the report"
    )
    parser.set_defaults(run=run, level="default")


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, such as 2/14; got {text}")
    return int(match[1]), int(match[2])


def run(arguments: argparse.Namespace) -> int:
    """Check, print, and return the exit code."""
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        return _usage_error(f"unknown device {arguments.device!r}; use cpu, cuda or cuda:N.")
    if device.type not in ("cpu", "cuda"):
        return _usage_error(f"--device {device} is not supported; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        return _usage_error(
            f"--device {device}: no such CUDA device here (has: {there or 'none'})."
        )
    names = list(arguments.backend or NAMES)
    cases = {name: cases_of(name, device, arguments) for name in names}
    if arguments.case and not any(cases.values()):
        return _usage_error(_no_such_case(names, device, arguments))
    planned = {name: shard_of(cases[name], arguments.shard) for name in names}
    outcome = Outcome()
    try:
        _check(planned, device, arguments, outcome)
    except KeyboardInterrupt as interrupt:
        left = {name: _number_here(name, device, planned[name]) for name in names}
        raise interrupts.told(interrupt, stopped(interrupt, outcome, left)) from None
    passed = outcome.passed(named=bool(arguments.backend), whole=arguments.shard is None)
    if arguments.json:
        print(json.dumps(outcome.end(passed)), flush=True)
    else:
        print(f"\n{outcome.render()}\n")
        print(last_lines(outcome, passed, _limits(device, arguments)))
    return 0 if passed else 1


def _check(
    planned: dict[str, list[parity.AnyCase]],
    device: torch.device,
    arguments: argparse.Namespace,
    outcome: Outcome,
) -> None:
    """Run every backend's cases, print as they end, and leave the events in `outcome`."""
    with Pulse("starting", silent=arguments.json) as pulse:
        if not arguments.json:
            numbers = {name: _number_here(name, device, planned[name]) for name in planned}
            print(first_lines(device, numbers), flush=True)
        for name, cases in planned.items():
            pulse.now(f"{name} starts")
            stream = _events(name, device, cases, arguments, alone=len(planned) == 1)
            with contextlib.closing(stream):
                for event in stream:
                    outcome.add(event)
                    begins = event["event"] == "begin"
                    if arguments.json or not begins:
                        print(json.dumps(event) if arguments.json else line_of(event), flush=True)
                    pulse.now(f"{name}, {event['case']}" if begins else name)


def _number_here(name: str, device: torch.device, cases: list[parity.AnyCase]) -> int:
    """How many cases of a backend can run: none, where it cannot."""
    can_run = _is_interpreted(name, device) or get(name).unavailable_reason() is None
    return len(cases) if can_run else 0


def _limits(device: torch.device, arguments: argparse.Namespace) -> Limits:
    chosen = ("case", "dtype", "shard")
    return Limits(
        device=device,
        has_gpu=torch.cuda.is_available(),
        options=[f"--{option}" for option in chosen if getattr(arguments, option)],
    )


def _usage_error(message: str) -> int:
    print(f"adapterkern check: error: {message}", file=sys.stderr)
    return 2


def _no_such_case(names: list[str], device: torch.device, arguments: argparse.Namespace) -> str:
    every = argparse.Namespace(**{**vars(arguments), "case": None})
    ids = [str(case) for name in names for case in cases_of(name, device, every)]
    examples = ", ".join(ids[:: max(1, len(ids) // _EXAMPLES)][:_EXAMPLES])
    patterns = ", ".join(arguments.case)
    return f"--case {patterns} fits none of {len(ids)} cases; some are {examples or 'none'}."


def _is_interpreted(name: str, device: torch.device) -> bool:
    """Whether the kernels of this backend run in Triton's interpreter, for want of a GPU."""
    on_cpu = name == "triton" and device.type == "cpu"
    return on_cpu and importlib.util.find_spec("triton") is not None


def _events(
    name: str,
    device: torch.device,
    cases: list[parity.AnyCase],
    arguments: argparse.Namespace,
    alone: bool,
) -> Generator[Event, None, None]:
    """Yield one backend's events, run here or in a process of its own, or why in neither."""
    interpreted = _is_interpreted(name, device)
    if not cases:  # none are in this shard, or fit --case
        yield backend_event(name, device, None, 0)
    elif interpreted and not _env.TRITON_INTERPRET:
        variables = {"TRITON_INTERPRET": "1"}
        yield from events_of_a_process(name, device, cases, arguments, variables)
    elif not alone and get(name).unavailable_reason() is None:
        yield from events_of_a_process(name, device, cases, arguments, {})
    else:
        if interpreted:
            testing.enable_triton_interpreter()
        yield from events(name, device, cases)
