"""What runs fused in a model and what does not, as rows and as a table."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapterkern.integrations.adapterhub.reasons import REASONS
from adapterkern.integrations.foreign.activations import activation_name

COLUMNS = ("layer", "location", "adapter", "H", "R", "activation", "path", "reason")


@dataclass(frozen=True)
class Row:
    """One adapter in one layer; `path` is "fused" or "fallback", `reason` its code."""

    layer: str  # the name of the library's BottleneckLayer in the model
    location: str  # mh_adapter | output_adapter | cross_adapter
    adapter: str
    hidden_size: int | None
    bottleneck_size: int | None
    activation: str
    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Every adapter of a model and the path it takes, as `explain` and `patch` return it."""

    rows: tuple[Row, ...]
    patched: bool

    @property
    def fused(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.path == "fused")

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.path != "fused")

    def by_reason(self) -> dict[str, list[Row]]:
        """The fallbacks, grouped by the code of their reason."""
        grouped: dict[str, list[Row]] = {}
        for row in self.fallbacks:
            grouped.setdefault(row.reason, []).append(row)
        return grouped

    def __str__(self) -> str:
        state = "patched" if self.patched else "not patched: all of it runs the library's code"
        if not self.rows:
            return f"no adapters yet ({state})"
        verb = "run" if self.patched else "would run"
        head = f"{len(self.fused)} of {len(self.rows)} adapter layers {verb} fused ({state})"
        lines = [COLUMNS, *_collapsed(self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        table = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        why = [f"  {reason}: {REASONS[reason]}" for reason in self.by_reason()]
        return "\n".join([head, *table, *why])


def _collapsed(rows: Iterable[Row]) -> Iterator[tuple[str, ...]]:
    """Rows as cells; those that differ in a layer's number alone are one line with ranges."""
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for row in rows:
        sizes = [
            "?" if size is None else str(size) for size in (row.hidden_size, row.bottleneck_size)
        ]
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.layer)
        key = (pattern, row.location, row.adapter, *sizes, row.activation, row.path, row.reason)
        groups.setdefault(key, []).append(
            [int(n) for n in re.findall(r"(?<![^.])\d+(?![^.])", row.layer)]
        )
    for (pattern, *cells), numbers in groups.items():
        for position in range(pattern.count("*")):
            pattern = pattern.replace("*", _ranges(sorted({n[position] for n in numbers})), 1)
        yield (pattern, *cells)


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in short: 3 for one, {0-2,5} for several."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return text if len(numbers) == 1 else "{" + text + "}"


def sizes_of(adapter: nn.Module) -> tuple[int | None, int | None]:
    """H and R of an adapter of the library, as it was built."""
    return getattr(adapter, "input_size", None), getattr(adapter, "down_sample", None)


def shown_activation(adapter: Any) -> str:
    """The name of an adapter's activation, by its class where it has no fused form."""
    layer = getattr(adapter, "non_linearity", None)
    function = getattr(layer, "f", layer)
    return activation_name(function) or str(getattr(function, "__name__", type(function).__name__))
