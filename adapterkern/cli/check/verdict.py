"""What `adapterkern check` says before its cases and after them, and when a signal ends it."""

import signal
from dataclasses import dataclass

import torch

from adapterkern import __version__
from adapterkern.backends import NAMES
from adapterkern.cli.check.outcome import Outcome, wrapped
from adapterkern.cli.interrupts import number_of


@dataclass(frozen=True)
class Limits:
    """What a run left out.

    options: those of --case, --dtype and --shard that were given.
    """

    device: torch.device
    has_gpu: bool
    options: list[str]


def first_lines(device: torch.device, numbers: dict[str, int]) -> str:
    """Versions, how many cases there are, and what the columns of their lines are."""
    cases = ", ".join(f"{name} {number}" for name, number in numbers.items() if number)
    return (
        f"adapterkern {__version__}, torch {torch.__version__}, on {_place(device)}\n"
        f"cases to compare with float64: {cases or 'none'}\n"
        "verdict, share of the tolerance used, time, case:"
    )


def last_lines(outcome: Outcome, passed: bool, limits: Limits) -> str:
    """The count, and in plain words what it says of this machine."""
    end = outcome.end(passed)
    ran = outcome.ran()
    count = f"{end['comparisons']} comparisons on {_listed(ran) or 'nothing'}"
    lines = [f"{'passed' if passed else 'FAILED'}: {count}, {end['missed']} missed"]
    if not passed:
        absent = [b["backend"] for b in outcome.backends if b["backend"] not in ran]
        if end["missed"]:
            said = "This machine does not compute right: MISSED, RAISED and LOST above tell where."
        else:
            said = f"Nothing is known of {_listed(absent)}, which --backend names: see above."
    elif not ran:
        said = "Nothing was compared, so nothing is known of this machine."
    else:
        said = "This machine computes right."
    left_out = _left_out(ran, limits)
    if left_out and ran:
        said += f" Not checked: {'; '.join(left_out)}."
    return "\n".join([*lines, wrapped(said, indent="")])


def _left_out(ran: list[str], limits: Limits) -> list[str]:
    backends = ", ".join(name for name in NAMES if name not in ran)
    found = [backends] if backends else []
    if limits.device.type == "cpu":
        found.append(f"anything on a GPU ({'--device cpu' if limits.has_gpu else 'none here'})")
    if limits.options:
        leave = "leaves" if len(limits.options) == 1 else "leave"
        found.append(f"what {_listed(limits.options)} {leave} out")
    return found


def stopped(interrupt: KeyboardInterrupt, outcome: Outcome, numbers: dict[str, int]) -> str:
    """What was done until a signal; numbers: how many cases each backend has that runs here."""
    done, begun, waiting = [], [], []
    for name, number in numbers.items():
        ended = len(outcome.cases.get(name, ()))
        if not number:
            continue
        if name not in outcome.cases:
            waiting.append(name)
        elif ended < number and not outcome.is_lost(name):
            begun.append(f"{name} ({ended} of {number} cases)")
        else:
            done.append(name)
    end = outcome.end(passed=False)
    states = {"done": done, "begun": begun, "not begun": waiting}
    listed = "; ".join(f"{state}: {_listed(names)}" for state, names in states.items() if names)
    cases = sum(len(events) for events in outcome.cases.values())
    return (
        f"adapterkern check: stopped by {signal.Signals(number_of(interrupt)).name} after {cases} "
        f"of {sum(numbers.values())} cases ({end['comparisons']} comparisons, "
        f"{outcome.seconds():.0f} s): {end['missed']} missed so far; {listed or 'nothing to do'}"
    )


def _place(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _listed(names: list[str]) -> str:
    """a, b and c"""
    *others, last = names or [""]
    return f"{', '.join(others)} and {last}" if others else last
