"""The pictures of a report: adapters by mode, and what adapters add to models."""

from pathlib import Path
from typing import Any

from adapterkern.bench.plot import plot
from adapterkern.bench.results import ModelRow, Result

COLORS = {
    "plain": "#999999",
    "adapterhub": "#E69F00",
    "lora": "#CC79A7",
    "adapterkern": "#D55E00",
    "adapterkern-skip": "#0072B2",
    "full": "#555555",
}


def draw(result: Result, path: Path) -> list[Path]:
    """Write <stem>-<mode>.png and <stem>-models.png beside `path`; the paths that were written."""
    written = []
    for mode in dict.fromkeys(row.case.mode for row in result.rows):
        part = Result(result.header, [row for row in result.rows if row.case.mode == mode])
        if any(row.time is not None for row in part.rows):
            target = path.with_name(f"{path.stem}-{mode}.png")
            plot(part, target)
            written.append(target)
    rows = [row for row in result.models if row.milliseconds is not None]
    if rows:
        target = path.with_name(f"{path.stem}-models.png")
        _draw_models(result, rows, target)
        written.append(target)
    return written


def _draw_models(result: Result, rows: list[ModelRow], path: Path) -> None:
    """Bars by model: per cent over the plain model with a GPU, else milliseconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if result.on_gpu:
        rows = [row for row in rows if row.overhead_percent is not None and row.variant != "full"]
        unit = "per cent over the plain model"
    else:
        unit = "ms (CPU, widths of a few units: shows that it runs, nothing else)"
    groups = list(dict.fromkeys((row.model, row.mode, row.execution) for row in rows))
    names = [name for name in COLORS if any(row.variant == name for row in rows)]
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(names) * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    height = 0.84 / max(1, len(names))
    for place, name in enumerate(names):
        spots, values = [], []
        for index, group in enumerate(groups):
            for row in rows:
                if (row.model, row.mode, row.execution) == group and row.variant == name:
                    spots.append(index + (place - (len(names) - 1) / 2) * height)
                    values.append(_value(row, result.on_gpu))
        bars = axes.barh(spots, values, height * 0.9, color=COLORS[name], label=name)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(groups)), [" ".join(group) for group in groups], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(f"{result.device}: models with adapters", fontsize=11)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.2)
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _value(row: ModelRow, on_gpu: bool) -> float:
    if on_gpu:
        assert row.overhead_percent is not None  # the others were left out
        return row.overhead_percent
    assert row.milliseconds is not None
    return row.milliseconds.p50
