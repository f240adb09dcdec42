"""What runs each adapter of a model, as rows and as a table."""

from dataclasses import astuple, dataclass
from typing import Any

from torch import nn

from adapterkern.integrations.adapterhub.reasons import GROUP_REASONS, NORM_REASONS, REASONS
from adapterkern.integrations.foreign.activations import activation_name
from adapterkern.modules.explain import table

COLUMNS = (
    "layer", "location", "adapter", "H", "R", "activation", "runs on", "reason", "norm", "together",
)  # fmt: skip
LIBRARY = "library"  # the code of AdapterHub itself


@dataclass(frozen=True)
class Row:
    """One adapter in one layer; `runs_on` is the backend of adapterkern that runs it, or LIBRARY,
    and `reason` then the code of why. `norm` says of a norm behind a fused adapter that it runs in
    the same pass (`SAME_PASS`), or is the code of why it does not; "" where there is none.
    `together` says of a fused adapter that the setup puts in a Parallel or BatchSplit that it runs
    with the others of it (`SAME_LAUNCH`), or is the code of why it runs by itself.
    """

    layer: str  # the name of the library's BottleneckLayer in the model
    location: str  # mh_adapter | output_adapter | cross_adapter
    adapter: str
    hidden_size: int | None
    bottleneck_size: int | None
    activation: str
    runs_on: str
    reason: str
    norm: str = ""
    together: str = ""


@dataclass(frozen=True)
class Report:
    """Every adapter of a model and what runs it, as `explain` and `patch` return it."""

    rows: tuple[Row, ...]
    patched: bool

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The adapters that adapterkern runs in the library's place, in a patched model."""
        return tuple(row for row in self.rows if row.runs_on != LIBRARY)

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """The adapters that the library runs, patched or not."""
        return tuple(row for row in self.rows if row.runs_on == LIBRARY)

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
        count = f"{len(self.replaced)} of {len(self.rows)} adapter layers"
        head = f"{count} {verb} in adapterkern ({state})"
        cells = [[("?" if c is None else str(c)) for c in astuple(row)] for row in self.rows]
        why = [f"  {reason}: {REASONS[reason]}" for reason in self.by_reason()]
        codes = dict.fromkeys(row.norm for row in self.rows if row.norm in NORM_REASONS)
        why += [f"  {code}: {NORM_REASONS[code]}" for code in codes]
        codes = dict.fromkeys(row.together for row in self.rows if row.together in GROUP_REASONS)
        why += [f"  {code}: {GROUP_REASONS[code]}" for code in codes]
        shown = None if any(row.together for row in self.rows) else -1  # not an empty column
        lines = table(COLUMNS[:shown], [row[:shown] for row in cells])
        return "\n".join([head, *lines, *why])


def sizes_of(adapter: nn.Module) -> tuple[int | None, int | None]:
    """H and R of an adapter of the library, as it was built."""
    return getattr(adapter, "input_size", None), getattr(adapter, "down_sample", None)


def shown_activation(adapter: Any) -> str:
    """The name of an adapter's activation, by its class where it has no fused form."""
    layer = getattr(adapter, "non_linearity", None)
    function = getattr(layer, "f", layer)
    return activation_name(function) or str(getattr(function, "__name__", type(function).__name__))
