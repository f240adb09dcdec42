"""One backend's part of `adapterkern check` in a process of its own, as a stream of its events."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import torch

from adapterkern import _env, parity
from adapterkern.cli import interrupts
from adapterkern.cli.check.worker import Event, backend_event, case_event


def events_of_a_process(
    name: str,
    device: torch.device,
    cases: list[parity.AnyCase],
    arguments: argparse.Namespace,
    environment: dict[str, str],
) -> Iterator[Event]:
    """Yield the events of `adapterkern check --json --backend NAME`, or of its death.

    Where the stream is closed before its end, or interrupted, the process is ended with it.
    """
    command = [sys.executable, "-m", "adapterkern", "check", "--json", "--backend", name]
    command += ["--device", str(device)]
    command += [f"--{arguments.level}"] if arguments.level != "default" else []
    command += [word for dtype in arguments.dtype or [] for word in ("--dtype", dtype)]
    command += [f"--case={pattern}" for pattern in arguments.case or []]
    command += ["--shard", "{}/{}".format(*arguments.shard)] if arguments.shard else []
    variables = {**os.environ, **environment}
    for unknown in _env.UNKNOWN:  # this process has told of it
        variables.pop(unknown, None)
    done = {"backend": 0, "begin": 0, "case": 0, "end": 0}
    process = None
    try:
        with interrupts.held(), interrupts.children_undisturbed():
            process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
        for line in process.stdout or ():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:  # printed by a library or a kernel
                print(line, end="", file=sys.stderr)
                continue
            done[event["event"]] += 1
            if event["event"] != "end":
                yield event
        process.wait()
    finally:
        if process is not None:
            _end(process)
    if done["end"]:
        return
    if not done["backend"]:
        yield backend_event(name, device, None, len(cases))
    during = cases[min(done["case"], len(cases) - 1)]
    note = (
        f"the process ended {how(process.returncode)} during this case, or between two: see above"
    )
    row = {"tensor": "-", "error": None, "tolerance": None, "passed": False, "note": note}
    row |= {"dtype": during.dtype_class, "activation": during.activation}
    yield case_event(name, str(during), "lost", 0.0, note, [row])


def _end(process: subprocess.Popen) -> None:
    """Leave nothing of a process, nor its pipe."""
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def how(code: int) -> str:
    """In which way a process with this return code ended."""
    if code >= 0:
        return f"with code {code}"
    try:
        return f"by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
