"""`adapterkern check`: every backend that can run here against float64, forward and gradients.

It runs the cases of `adapterkern.parity`, each backend in its own process, so that none suffers
from what another does to the device. Where there is no GPU, the Triton kernels run in Triton's CPU
interpreter, which is chosen when kernels are defined. One backend alone that needs no such choice
runs in this process.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import torch

from adapterkern import _env, parity, testing
from adapterkern.backends import NAMES, get
from adapterkern.cli.check.outcome import Outcome, line_of
from adapterkern.cli.check.worker import (
    DTYPES,
    Event,
    backend_event,
    case_event,
    cases_of,
    events,
    shard_of,
)

DESCRIPTION = """\
Compares y, the norm of it, and the gradients of x, residual, skip, both weights, both biases, the
scaling and the norm's parameters with a computation in float64, for every backend that can run on
this machine, over dtypes (TF32 among them), activations, sizes and all options of a call, also with
Inf and NaN in x and the gradient of y, and with many adapters in a batch. On a GPU the sizes reach
every form of the kernels. Without one the Triton kernels run in Triton's CPU interpreter, at small
sizes.

Prints a line as each case ends: the verdict, the case, the most that a tensor used up of its
tolerance, the seconds. A backend stops where it loses the device or dies, and the others still run.

The error is rms(out - float64) / rms(float64). The tolerance is twice (gradients: three times) the
error that plain PyTorch operations make in the same dtype on the same device, and at least one
rounding of the output. The table at the end shows, per dtype of the products and tensor, the case
that came closest to its tolerance.
"""

EPILOG = """\
examples:
  adapterkern check                        about half a minute on two CPU cores
  adapterkern check --quick                every dtype and activation, once
  adapterkern check --backend triton --dtype bf16 --full
  adapterkern check --backend cuda --case 'bf16-*-nonfinite' --case '*R136*'
  adapterkern check --shard 2/14           of every 14 cases the second, for 14 processes at once
  adapterkern check --json | tail -n 1     one JSON object a line; the last has the verdict

exit codes:
  0  every comparison is within its tolerance
  1  a miss, a backend that raised, died or lost the device, or a backend named with --backend that
     cannot run here
  2  wrong usage
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

    outcome = Outcome()
    for name in names:
        left = shard_of(cases[name], arguments.shard)
        for event in _events(name, device, left, arguments, alone=len(names) == 1):
            outcome.add(event)
            if arguments.json or event["event"] != "begin":
                print(json.dumps(event) if arguments.json else line_of(event), flush=True)
    passed = outcome.passed(named=bool(arguments.backend), whole=arguments.shard is None)
    if arguments.json:
        print(json.dumps(outcome.end(passed)), flush=True)
    else:
        print(f"\n{outcome.render(passed)}")
    return 0 if passed else 1


def _usage_error(message: str) -> int:
    print(f"adapterkern check: error: {message}", file=sys.stderr)
    return 2


def _no_such_case(names: list[str], device: torch.device, arguments: argparse.Namespace) -> str:
    every = argparse.Namespace(**{**vars(arguments), "case": None})
    ids = [str(case) for name in names for case in cases_of(name, device, every)]
    examples = ", ".join(ids[:: max(1, len(ids) // _EXAMPLES)][:_EXAMPLES])
    patterns = ", ".join(arguments.case)
    return f"--case {patterns} fits none of {len(ids)} cases; some are {examples or 'none'}."


def _events(
    name: str,
    device: torch.device,
    cases: list[parity.AnyCase],
    arguments: argparse.Namespace,
    alone: bool,
) -> Iterator[Event]:
    """Yield one backend's events, run here or in a process of its own, or why in neither."""
    if not cases:  # none are in this shard, or fit --case
        return iter([backend_event(name, device, None, 0)])
    interpreted = name == "triton" and device.type == "cpu" and importlib.util.find_spec("triton")
    if interpreted and not _env.TRITON_INTERPRET:
        return _in_a_process(name, device, cases, arguments, {"TRITON_INTERPRET": "1"})
    if not alone and get(name).unavailable_reason() is None:
        return _in_a_process(name, device, cases, arguments, {})
    if interpreted:
        testing.enable_triton_interpreter()
    return events(name, device, cases)


def _in_a_process(
    name: str,
    device: torch.device,
    cases: list[parity.AnyCase],
    arguments: argparse.Namespace,
    environment: dict[str, str],
) -> Iterator[Event]:
    """Yield the events of `adapterkern check --json --backend NAME`, or of its death."""
    command = [sys.executable, "-m", "adapterkern", "check", "--json", "--backend", name]
    command += ["--device", str(device)]
    command += [f"--{arguments.level}"] if arguments.level != "default" else []
    command += [word for dtype in arguments.dtype or [] for word in ("--dtype", dtype)]
    command += [f"--case={pattern}" for pattern in arguments.case or []]
    command += ["--shard", "{}/{}".format(*arguments.shard)] if arguments.shard else []
    done = {"backend": 0, "begin": 0, "case": 0, "end": 0}
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stdout or ():
                try:
                    event = json.loads(line)
                except json.JSONDecodeError:  # printed by a library or a kernel
                    print(line, end="", file=sys.stderr)
                    continue
                done[event["event"]] += 1
                if event["event"] != "end":
                    yield event
        except BaseException:  # this process was interrupted
            process.kill()
            raise
    if done["end"]:
        return
    if not done["backend"]:
        yield backend_event(name, device, None, len(cases))
    during = cases[min(done["case"], len(cases) - 1)]
    note = (
        f"the process ended {_how(process.returncode)} during this case, or between two: see above"
    )
    row = {"tensor": "-", "error": None, "tolerance": None, "passed": False, "note": note}
    row |= {"dtype": during.dtype_class, "activation": during.activation}
    yield case_event(name, str(during), "lost", 0.0, note, [row])


def _how(code: int) -> str:
    if code >= 0:
        return f"with code {code}"
    try:
        return f"by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
