"""What the default run keeps of a sweep, and the word on what it left out.

`-m "not thorough"` of pyproject.toml decides, so that a `-m` of the caller's takes its place.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields

import pytest

COMMAND = "pytest -n 2 --dist worksteal -m thorough"
LEFT_OUT = "thorough_left_out"  # a worker of pytest-xdist tells the run by this name


def covering(shown: Sequence[set[Hashable]]) -> list[int]:
    """Return few indices that together show all that any does: each next one shows the most that
    is new, so that where two sweeps cross, the one takes turns through the other."""
    left = set().union(*shown)
    kept = []
    while left:
        best = max(range(len(shown)), key=lambda index: len(shown[index] & left))
        kept.append(best)
        left -= shown[best]
    return kept


def mark_sweeps(items: Sequence[pytest.Item]) -> None:
    """Mark as `thorough` what a `sweep` need not keep."""
    sweeps = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") is not None:
            sweeps[item.path, item.originalname].append(item)
    for cases in sweeps.values():
        keys = cases[0].get_closest_marker("sweep").args
        shown = [{(key, _value(item, key)) for key in keys} or {"any"} for item in cases]
        kept = set(covering(shown))
        for index, item in enumerate(cases):
            if index not in kept:
                item.add_marker("thorough")


def _value(item: pytest.Item, key) -> str:
    """A key is the name of a parameter, or a function of all parameters by their names."""
    parameters = item.callspec.params
    return repr(parameters[key] if isinstance(key, str) else key(parameters))


def fields_of(parameter: str, kind: type) -> list[Callable[[dict], object]]:
    """Keys of a `sweep` over dataclasses: each value of every field is to be shown."""
    return [lambda p, name=each.name: getattr(p[parameter], name) for each in fields(kind)]


class Report:
    """Counts what `-m "not thorough"` leaves out, in every worker, and says so at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.left_out = 0

    @pytest.hookimpl(tryfirst=True)  # pytest's own deselects by -m
    def pytest_collection_modifyitems(self, items):
        mark_sweeps(items)
        if self.config.option.markexpr == "not thorough":
            self.left_out = sum(item.get_closest_marker("thorough") is not None for item in items)
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput[LEFT_OUT] = self.left_out

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """Every worker collects all tests."""
        found = getattr(node, "workeroutput", {}).get(LEFT_OUT, 0)
        self.left_out = max(self.left_out, found)

    def pytest_terminal_summary(self, terminalreporter):
        if self.left_out:
            terminalreporter.write_line(
                f"{self.left_out} thorough tests were left out; run them with: {COMMAND}"
            )
