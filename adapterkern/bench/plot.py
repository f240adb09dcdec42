"""Pictures of a result, one panel a shape and mode: time against tokens, with the floor; where
there is one number of tokens, bars."""

import itertools
from pathlib import Path
from typing import Any

from adapterkern.bench import roofline
from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import NO_RATIO, Result, Row
from adapterkern.bench.table import TIME_UNITS, in_unit, processor, time_unit

# Okabe and Ito's palette; markers tell the lines apart without any colour.
_OURS = ("#D55E00", "#0072B2", "#009E73")
_BASELINE_COLORS = ("#555555", "#E69F00", "#56B4E9", "#CC79A7", "#999999", "#B8A400", "#8C564B")
_MARKERS = "sv^D<>P*X"


def refusal(path: Path) -> str | None:
    """Say before anything is measured why no picture can be written to `path`; None if one can."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except Exception as error:  # a broken installation raises whatever it likes
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f"matplotlib cannot be imported ({text})\n  hint: pip install matplotlib"
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
    rows = [row for row in result.rows if row.time is not None and row.provider not in NO_RATIO]
    if not rows:
        raise ValueError("no row has a time, so there is nothing to plot.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(rows)
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    height = 1.0 + 0.34 * max(map(len, panels)) if all(map(_one_count, panels)) else 3.4
    figure = Figure(figsize=(4.4 * columns + 1.9, height * lines + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(result), fontsize=11)
    figure.supxlabel(_caption(result), fontsize=8, color="#444444")
    grid = figure.subplots(lines, columns, squeeze=False)
    styles = _styles(rows)
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_axis_off()
        elif _one_count(panel):
            _draw_bars(axes, panel, styles, result)
        else:
            _draw_lines(axes, panel, styles, result)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:  # bars carry their names
        figure.legend(
            handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9
        )
    figure.savefig(path, dpi=130)


def _panels(rows: list[Row]) -> list[list[Row]]:
    """Return the rows of each panel. A line needs two numbers of tokens in one kind of timing;
    where there is none, each number of tokens is a panel of its own, of bars.
    """
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(_shape(row), []).append(row)
    found: list[list[Row]] = []
    for panel in panels.values():
        points = {(row.headline, row.case.tokens) for row in panel}
        if len(points) > len({headline for headline, _ in points}):
            found.append(panel)
            continue
        for tokens in sorted({row.case.tokens for row in panel}):
            found.append([row for row in panel if row.case.tokens == tokens])
    return found


def _shape(row: Row) -> tuple[Any, ...]:
    case = row.case
    many = (case.adapters, case.mix) if case.adapters else ()
    return case.mode, case.norm, case.dtype, case.activation, case.shape, *many


def _one_count(rows: list[Row]) -> bool:
    return len({row.case.tokens for row in rows}) == 1


def _title(result: Result) -> str:
    if not result.on_gpu:
        return f"{processor(result)}: one adapter on the CPU, no GPU was measured"
    return f"{result.device}: time of one adapter"


def _caption(result: Result) -> str:
    """Say by which versions and when, and what is drawn."""
    header = result.header
    versions = header.get("versions", {})
    names = ("adapterkern", "torch", *(("triton",) if result.on_gpu else ()))
    facts = [f"{name} {versions[name]}" for name in names if versions.get(name)]
    facts += [f"commit {header['commit'][:9]}"] if header.get("commit") else []
    facts += [header["created"][:10]] if header.get("created") else []
    floor = "; floor: what memory and products allow at least" if result.on_gpu else ""
    return f"{', '.join(facts)}\nmedian of the calls, and the 20th to the 80th percentile{floor}"


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    ours = list(dict.fromkeys(row.label for row in rows if row.ours))
    for name, color in zip(ours, itertools.cycle(_OURS)):
        styles[name] = {"color": color, "marker": "o", "linewidth": 2.4, "zorder": 3}
    others = list(dict.fromkeys(row.label for row in rows if not row.ours))
    marks = zip(others, itertools.cycle(_BASELINE_COLORS), itertools.cycle(_MARKERS))
    for name, color, marker in marks:
        styles[name] = {"color": color, "marker": marker, "linewidth": 1.2}
    return styles


def _draw_bars(
    axes: Any, rows: list[Row], styles: dict[str, dict[str, Any]], result: Result
) -> None:
    """Draw a bar for each implementation, the first on top, with its median as a number."""
    timed = [(row, row.time) for row in rows if row.time is not None]
    unit = time_unit(time.p50 for _, time in timed)
    scale = TIME_UNITS[unit]
    longest = max(time.p50 for _, time in timed) / scale
    # A disturbed run has whiskers that would leave no room for the bars: they end at an arrow.
    end = max(1.3 * longest, min(2 * longest, 1.05 * max(time.p80 for _, time in timed) / scale))
    for place, (row, time) in enumerate(timed):
        low, median, high = (value / scale for value in (time.p20, time.p50, time.p80))
        axes.barh(place, median, height=0.7, color=styles[row.label]["color"])
        shown = min(high, end)
        axes.plot([low, shown], [place, place], color="black", linewidth=1)
        for mark, at in (("|", low), ("|" if high <= end else ">", shown)):
            axes.plot(at, place, mark, color="black", markersize=6, clip_on=False)
        number = f"{in_unit(time.p50, unit)} {unit}"
        axes.text(median + 0.01 * end, place - 0.08, number, va="bottom", fontsize=8)
    machine = from_dict(result.header.get("calibration", {})).machine(rows[0].case.dtype)
    if result.on_gpu and machine is not None:
        floor = roofline.seconds(rows[0].case, machine) * 1e6 / scale
        axes.axvline(floor, linestyle="--", color="black", linewidth=1.4, label="floor")
    axes.set_yticks(range(len(timed)), [row.label for row, _ in timed], fontsize=9)
    for tick, (row, _) in zip(axes.get_yticklabels(), timed, strict=True):
        tick.set_fontweight("bold" if row.ours else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel(_unit_label(unit, [rows[0].headline], result))
    _finish(axes, rows[0], f", {rows[0].case.tokens:,} tokens")
    axes.grid(axis="y", visible=False)


def _draw_lines(
    axes: Any, rows: list[Row], styles: dict[str, dict[str, Any]], result: Result
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    case = rows[0].case
    headlines = list(dict.fromkeys(row.headline for row in sorted(rows, key=_tokens)))
    unit = time_unit(row.time.p50 for row in rows if row.time)
    scale = TIME_UNITS[unit]
    for name, style in styles.items():
        label = name
        for kind in headlines:  # a line never joins two kinds of timing
            points = sorted(
                (row.case.tokens, *(t / scale for t in (time.p50, time.p20, time.p80)))
                for row in rows
                if row.label == name and row.headline == kind and (time := row.time) is not None
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
            [roofline.seconds(case, machine) * 1e6 / scale for _, case in floor],
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
    axes.set_ylabel(_unit_label(unit, headlines, result))
    _finish(axes, rows[0])


def _unit_label(unit: str, headlines: list[str], result: Result) -> str:
    return f"{unit} a call" + (f" ({', '.join(headlines)})" if result.on_gpu else "")


def _finish(axes: Any, row: Row, tokens: str = "") -> None:
    case = row.case
    title = f"{case.mode}{tokens}, H {case.hidden_size}, R {case.bottleneck_size}, {case.dtype}"
    title += "" if case.norm == "none" else f", {case.norm} norm"
    title += f", {case.adapters} adapters ({case.mix})" if case.adapters else ""
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
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
