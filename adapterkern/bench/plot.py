"""Pictures of a result: time against tokens, one panel a shape and mode, with the floor."""

import itertools
from pathlib import Path
from typing import Any

from adapterkern.bench import roofline
from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import Result, Row

# Okabe and Ito's palette; markers tell the lines apart without any colour.
_OURS = ("#D55E00", "#0072B2", "#009E73")
_BASELINE_COLORS = ("#555555", "#E69F00", "#56B4E9", "#CC79A7", "#999999", "#B8A400", "#8C564B")
_MARKERS = "sv^D<>P*X"
_UNDRAWN = ("no-adapter", "routing")


def refusal(path: Path) -> str | None:
    """Say before anything is measured why no picture can be written to `path`; None if one can."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except Exception as error:  # a broken installation raises whatever it likes
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f'matplotlib cannot be imported ({text})\n  hint: pip install "adapterkern[plot]"'
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        return (
            f"cannot draw into {path}: unknown suffix {path.suffix!r}.\n"
            f"  hint: {', '.join(f'.{name}' for name in known)}"
        )
    return None


def plot(result: Result, path: Path) -> None:
    """Write the picture of `result` to `path`; the suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no row has a time.
    """
    rows = [row for row in result.rows if row.time is not None and row.provider not in _UNDRAWN]
    if not rows:
        raise ValueError("no row has a time, so there is nothing to plot.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(_panel(row) for row in rows))
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns + 1.9, 3.4 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(result), fontsize=11)
    grid = figure.subplots(lines, columns, squeeze=False)
    styles = _styles(rows)
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_axis_off()
            continue
        _draw(axes, [row for row in rows if _panel(row) == panel], styles, result)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=130)


def _panel(row: Row) -> tuple[str, ...]:
    case = row.case
    many = (f"{case.adapters} {case.mix}",) if case.adapters else ()
    return case.mode, case.norm, case.dtype, case.activation, case.shape, *many


def _title(result: Result) -> str:
    if not result.on_gpu:
        return f"{result.device}: PyTorch reference and plain layers, no GPU was measured"
    return f"{result.device}: time of one adapter"


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    ours = list(dict.fromkeys(row.provider for row in rows if row.ours))
    for name, color in zip(ours, itertools.cycle(_OURS)):
        styles[name] = {"color": color, "marker": "o", "linewidth": 2.4, "zorder": 3}
    others = list(dict.fromkeys(row.provider for row in rows if not row.ours))
    marks = zip(others, itertools.cycle(_BASELINE_COLORS), itertools.cycle(_MARKERS))
    for name, color, marker in marks:
        styles[name] = {"color": color, "marker": marker, "linewidth": 1.2}
    return styles


def _draw(axes: Any, rows: list[Row], styles: dict[str, dict[str, Any]], result: Result) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    case = rows[0].case
    headlines = list(dict.fromkeys(row.headline for row in sorted(rows, key=_tokens)))
    for name, style in styles.items():
        label = name
        for kind in headlines:  # a line never joins two kinds of timing
            points = sorted(
                (row.case.tokens, row.time.p50, row.time.p20, row.time.p80)
                for row in rows
                if row.provider == name and row.headline == kind and row.time is not None
            )
            if points:
                tokens, middle, low, high = zip(*points, strict=True)
                axes.plot(tokens, middle, label=label, markersize=5, **style)
                axes.fill_between(tokens, low, high, color=style["color"], alpha=0.12, linewidth=0)
                label = f"_{name}"  # an underscore keeps it out of the legend
    for left, right in itertools.pairwise(headlines):
        _mark_change(axes, rows, left, right)
    machine = from_dict(result.header.get("calibration", {})).machine(case.dtype)
    if result.on_gpu and machine is not None:
        floor = sorted({row.case.tokens: row.case for row in rows}.items())
        axes.plot(
            [tokens for tokens, _ in floor],
            [roofline.seconds(case, machine) * 1e6 for _, case in floor],
            "--", color="black", linewidth=1.4, label="floor",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row.case.tokens for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    if high < 4 * low:  # a decade's ticks need room, and noise must not look like a difference
        axes.set_ylim(low / 2, high * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"us a call ({', '.join(headlines)})")
    title = f"{case.mode}, H {case.hidden_size}, R {case.bottleneck_size}, {case.dtype}"
    title += "" if case.norm == "none" else f", {case.norm} norm"
    title += f", {case.adapters} adapters ({case.mix})" if case.adapters else ""
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def _tokens(row: Row) -> int:
    return row.case.tokens


def _mark_change(axes: Any, rows: list[Row], left: str, right: str) -> None:
    """Draw a line between the last case of one kind of timing and the first of the next."""
    last = max(row.case.tokens for row in rows if row.headline == left)
    first = min(row.case.tokens for row in rows if row.headline == right)
    middle = (last * first) ** 0.5
    axes.axvline(middle, color="#999999", linewidth=1, linestyle=":", label=f"_{left} | {right}")
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 8}
    for kind, side, offset in ((left, "right", -3), (right, "left", 3)):
        axes.annotate(kind, (middle, 0.97), xytext=(offset, 0), ha=side, va="top", **place)
