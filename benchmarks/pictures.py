"""The pictures of a report: adapters by mode, and what adapters add to models."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterkern.bench.plot import plot
from adapterkern.bench.results import ModelRow, Result, Row
from benchmarks.models import SPECS

COLORS = {
    "plain": "#999999",
    "adapterhub": "#E69F00",
    "adapterhub-patched": "#D55E00",
    "adapterhub-patched-calls": "#0072B2",
    "lora": "#CC79A7",
    "adapterkern": "#D55E00",
    "adapterkern-skip": "#0072B2",
    "adapterkern-norm": "#009E73",
    "full": "#555555",
}


def draw(result: Result, path: Path) -> tuple[list[Path], list[str]]:
    """Write <path>-<mode>.png and <path>-models-<family>.png.

    Returns:
        The paths that were written, and a sentence for each picture that failed.
    """
    work: dict[Path, Callable[[Path], None]] = {}
    for mode, rows in _panels(result).items():
        part = Result(result.header, rows)
        work[path.with_name(f"{path.name}-{mode}.png")] = functools.partial(plot, part)
    for family, models in _families(result).items():
        target = path.with_name(f"{path.name}-models-{family}.png")
        work[target] = functools.partial(_draw_models, result, models)
    written, problems = [], []
    for target, picture in work.items():
        try:
            picture(target)
            written.append(target)
        except Exception as error:  # one picture that fails leaves the others
            problems.append(f"{target.name}: {type(error).__name__}: {error}")
    return written, problems


def _panels(result: Result) -> dict[str, list[Row]]:
    """Return rows by mode, if timed at two numbers of tokens at least: one makes no line."""
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in result.rows:
        if row.time is not None and row.provider != "no-adapter":
            case = row.case
            many = case.adapters, case.mix
            key = case.mode, case.norm, case.dtype, case.activation, case.shape, *many
            panels.setdefault(key, []).append(row)
    by_mode: dict[str, list[Row]] = {}
    for (mode, *_), rows in panels.items():
        if len({row.case.tokens for row in rows}) > 1:
            by_mode.setdefault(mode, []).extend(rows)
    return by_mode


def _families(result: Result) -> dict[str, list[ModelRow]]:
    """Return models' timed rows by family: block, gpt2, bert, llama, and AdapterHub's presets."""
    by_name = {spec.name: spec for spec in SPECS}
    families: dict[str, list[ModelRow]] = {}
    for row in result.models:
        telling = row.overhead_percent is not None and row.variant != "full"
        if row.milliseconds is not None and (telling or not result.on_gpu):
            spec = by_name.get(row.model)
            family = "other" if spec is None else "adapterhub" if spec.preset else spec.family
            families.setdefault(family, []).append(row)
    return families


def _draw_models(result: Result, rows: list[ModelRow], path: Path) -> None:
    """Draw bars by model and execution: per cent over plain with a GPU, else milliseconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = "ms (CPU, widths of a few units)"
    if result.on_gpu:
        unit = "per cent over the plain model"
    names = [name for name in COLORS if any(row.variant == name for row in rows)]
    modes = list(dict.fromkeys(row.mode for row in rows))
    panels = [[row for row in rows if row.mode == mode] for mode in modes]
    groups = [sorted({(row.model, row.execution) for row in panel}) for panel in panels]
    height = 1.4 + 0.2 * (len(names) + 0.8) * max(map(len, groups))
    figure = Figure(figsize=(5.2 * len(modes) + 2, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{result.device}: models with adapters", fontsize=11)
    for axes, panel, here in zip(
        figure.subplots(1, len(modes), squeeze=False)[0], panels, groups, strict=True
    ):
        _draw_bars(axes, panel, here, names, result.on_gpu)
        axes.set_xlabel(unit)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _draw_bars(
    axes: Any,
    rows: list[ModelRow],
    groups: list[tuple[str, str]],
    names: list[str],
    on_gpu: bool,
) -> None:
    """Draw one mode: a group of bars for each model and execution, a bar for each variant."""
    height = 0.84 / len(names)
    for place, name in enumerate(names):
        found = {(r.model, r.execution): r for r in rows if r.variant == name}
        spots = [
            (index + (place - (len(names) - 1) / 2) * height, _value(found[group], on_gpu))
            for index, group in enumerate(groups)
            if group in found
        ]
        where, values = [spot for spot, _ in spots], [value for _, value in spots]
        bars = axes.barh(where, values, height * 0.9, color=COLORS[name], label=name)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(groups)), [" ".join(group) for group in groups], fontsize=9)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_title(rows[0].mode, fontsize=10)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.2)
    axes.set_axisbelow(True)


def _value(row: ModelRow, on_gpu: bool) -> float:
    if on_gpu:
        assert row.overhead_percent is not None  # the others were left out
        return row.overhead_percent
    assert row.milliseconds is not None
    return row.milliseconds.p50
