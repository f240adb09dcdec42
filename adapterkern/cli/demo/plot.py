"""One picture of a report: loss curves above, the comparison of methods below."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from adapterkern.cli.demo.findings import MethodResult, Report

# Okabe and Ito's palette, distinguishable with every common colour vision; the line styles and
# hatches tell the methods apart without any colour.
STYLES = {
    "adapters": ("#0072B2", "-", ""),
    "lora": ("#E69F00", "--", "//"),
    "full": ("#009E73", ":", ".."),
}
NEUTRAL = "#555555"
REACH = 6  # steps on either side that the smoothed loss averages over


def plot_report(report: Report, path: Path) -> None:
    """Write the picture of `report` to `path`; the suffix chooses the format."""
    tasks = [task.task for task in report.methods[0].tasks]
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    model, corpus = report.model, report.corpus
    figure.suptitle(
        f"{model['name']}, {corpus['texts']:,} docstrings of Python's standard library, "
        f"{report.command['steps']} steps of {report.command['batch_size']} texts",
        fontsize=12,
    )
    halves: Any = figure.subfigures(2, 1)
    top, bottom = halves
    loss_axes = top.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for index, (axes, task) in enumerate(zip(loss_axes, tasks, strict=True)):
        _draw_losses(axes, report.methods, index, task)
    loss_axes[0].set_ylabel("training loss (cross-entropy)")
    loss_axes[0].legend(frameon=False)
    accuracy_axes, size_axes = bottom.subplots(1, 2, width_ratios=[3, 2])
    _draw_accuracies(accuracy_axes, report, tasks)
    _draw_sizes(size_axes, report.methods)
    figure.savefig(path, dpi=130)


def moving_mean(losses: list[float]) -> list[float]:
    """Mean over each step and the REACH steps on either side of it, fewer at the ends."""
    windows = (losses[max(0, i - REACH) : i + REACH + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def _draw_losses(axes: Axes, methods: list[MethodResult], index: int, task: str) -> None:
    for method in methods:
        color, line, _ = STYLES[method.method]
        losses = method.tasks[index].losses
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=color, alpha=0.18, linewidth=0.8)
        axes.plot(steps, moving_mean(losses), line, color=color, linewidth=2, label=method.label)
    axes.set_title(f"task: {task} ({methods[0].tasks[index].num_classes} classes)", fontsize=11)
    axes.set_xlabel(f"step (thick line: mean over {2 * REACH + 1} steps)")
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _draw_accuracies(axes: Axes, report: Report, tasks: list[str]) -> None:
    width = 0.8 / len(report.methods)
    for place, method in enumerate(report.methods):
        color, _, hatch = STYLES[method.method]
        centers = [
            task + (place - (len(report.methods) - 1) / 2) * width for task in range(len(tasks))
        ]
        after = [task.after for task in method.tasks]
        bars = axes.bar(
            centers, after, width * 0.92, color=color, hatch=hatch, edgecolor="white", linewidth=0
        )
        axes.bar_label(bars, [f"{value:.1%}" for value in after], padding=2, fontsize=9)
        before = [task.before for task in method.tasks]
        axes.plot(
            centers, before, "v", color="white", markeredgecolor=NEUTRAL, markersize=6, zorder=3,
            label="before training" if place == 0 else None,
        )  # fmt: skip
    for index, task in enumerate(tasks):
        axes.plot(
            [index - 0.45, index + 0.45], [report.majority[task]] * 2, "--", color="black",
            linewidth=1.2, zorder=3, label="majority class" if index == 0 else None,
        )  # fmt: skip
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1.15)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title("held-out accuracy", fontsize=11)
    axes.legend(frameon=False, loc="upper right", ncols=2, fontsize=9)
    _tidy(axes)


def _draw_sizes(axes: Axes, methods: list[MethodResult]) -> None:
    for row, method in enumerate(methods):
        color, _, hatch = STYLES[method.method]
        bar = axes.barh(
            row, method.trained, 0.6, color=color, hatch=hatch, edgecolor="white", linewidth=0
        )
        axes.bar_label(bar, [f"{method.trained:,} ({method.share:.2%})"], padding=3, fontsize=9)
    axes.set_xlim(0, 1.75 * max(method.trained for method in methods))  # room for the numbers
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    axes.set_yticks(range(len(methods)), [method.label for method in methods])
    axes.invert_yaxis()
    axes.set_title("parameters trained for each task", fontsize=11)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.15)
    axes.set_axisbelow(True)
