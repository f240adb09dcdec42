"""One picture of a report: what the methods reach, what they train, how their losses fell."""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from adapterkern.cli.demo.findings import MethodResult, Report
from adapterkern.cli.demo.wording import (
    device_in_words,
    seeds_in_words,
    share,
    versions_in_words,
)

# Okabe and Ito's palette, distinguishable with every common colour vision; the line styles,
# hatches and markers tell the methods apart without any colour.
STYLES = {
    "adapters": ("#0072B2", "-", "", "o"),
    "lora": ("#E69F00", "--", "//", "s"),
    "full": ("#009E73", ":", "..", "D"),
}
NEUTRAL = "#555555"
REACH_SHARE = 12  # the smoothed loss averages over a 12th of the steps on either side
TITLE_COLUMNS, CAPTION_COLUMNS = 100, 140  # as wide as the picture in either's type


def plot_report(report: Report, path: Path) -> None:
    """Write the picture of `report` to `path`; the suffix chooses the format."""
    figure = draw(report)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)


def draw(report: Report) -> Figure:
    """The picture of `report`, on no canvas yet."""
    tasks = [task.task for task in report.methods[0].tasks]
    figure = Figure(figsize=(11, 8), layout="constrained")
    title = (
        f"{report.model['name']} on {device_in_words(report)}: "
        "bottleneck adapters beside LoRA and full fine-tuning"
    )
    figure.suptitle(textwrap.fill(title, TITLE_COLUMNS, break_on_hyphens=False), fontsize=12)
    figure.supxlabel(caption(report), fontsize=8.5, color=NEUTRAL)
    halves: Any = figure.subfigures(2, 1, height_ratios=[6, 5])
    top, bottom = halves
    top.legend(handles=_handles(report), loc="outside upper center", ncols=5, frameon=False)
    accuracy_axes, size_axes = top.subplots(1, 2, width_ratios=[3, 2])
    _draw_accuracies(accuracy_axes, report, tasks)
    _draw_sizes(size_axes, report.methods)
    loss_axes = bottom.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for index, (axes, task) in enumerate(zip(loss_axes, tasks, strict=True)):
        _draw_losses(axes, report.methods, index, task)
    loss_axes[0].set_ylim(0, 1.05 * loss_axes[0].get_ylim()[1])  # room for markers at the top
    loss_axes[0].set_ylabel(f"training loss of seed {report.seeds[0]}")
    return figure


def caption(report: Report) -> str:
    """What has to be known to judge the picture: data, training, intervals, versions."""
    corpus, command = report.corpus, report.command
    bars = (
        f"spread over {len(report.seeds)} seeds"
        if report.interval_of == "seeds"
        else f"bootstrap over the {corpus['held_out']:,} held-out texts"
    )
    text = (
        f"{corpus['train']:,} docstrings of Python's standard library to train on, "
        f"{corpus['held_out']:,} held out; {command['steps']} steps of {command['batch_size']} "
        f"texts; {seeds_in_words(report.seeds)}; error bars: 95 %, {bars}; "
        f"{versions_in_words(report)}"
    )
    return textwrap.fill(text, CAPTION_COLUMNS, break_on_hyphens=False)


def moving_mean(losses: list[float]) -> list[float]:
    """Mean over each step and its neighbours within `reach`, fewer at the ends."""
    near = reach(losses)
    windows = (losses[max(0, i - near) : i + near + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def reach(losses: list[float]) -> int:
    """How many steps on either side a smoothed loss averages over: none of a few steps."""
    return len(losses) // REACH_SHARE


def _handles(report: Report) -> list[Any]:
    """The legend's: the methods as in all panels, then the marks of the accuracies."""
    handles: list[Any] = []
    for method in report.methods:
        color, _, hatch, _ = STYLES[method.method]
        handles.append(Patch(facecolor=color, hatch=hatch, edgecolor="white", label=method.label))
    return [
        *handles,
        Line2D([], [], color="black", linestyle="--", linewidth=1.2, label="largest class, always"),
        Line2D(
            [], [], color="white", marker="v", markeredgecolor="black", markersize=8, linestyle="",
            label="before training",
        ),
    ]  # fmt: skip


def _draw_losses(axes: Axes, methods: list[MethodResult], index: int, task: str) -> None:
    for method in methods:
        color, line, _, marker = STYLES[method.method]
        losses = method.tasks[index].losses
        few = marker if reach(losses) == 0 else None  # a line of two points hides where they are
        axes.plot(
            range(1, len(losses) + 1), moving_mean(losses), line, color=color, linewidth=2,
            marker=few, label=method.label,
        )  # fmt: skip
    near = reach(methods[0].tasks[index].losses)
    axes.set_title(f"{task}: {methods[0].tasks[index].num_classes} classes", fontsize=11)
    axes.set_xlabel(f"step (mean over {2 * near + 1} steps, fewer at the ends)" if near else "step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if index == 0:
        axes.legend(frameon=False)
    _tidy(axes)


def _draw_accuracies(axes: Axes, report: Report, tasks: list[str]) -> None:
    width = 0.8 / len(report.methods)
    for place, method in enumerate(report.methods):
        color, _, hatch, _ = STYLES[method.method]
        centers = [
            task + (place - (len(report.methods) - 1) / 2) * width for task in range(len(tasks))
        ]
        after = [task.after for task in method.tasks]
        below = [task.after - task.interval[0] for task in method.tasks]
        above = [task.interval[1] - task.after for task in method.tasks]
        axes.bar(
            centers, after, width * 0.92, color=color, hatch=hatch, edgecolor="white", linewidth=0,
            label=method.label,
        )  # fmt: skip
        for ink, extra in (("white", 2.0), ("black", 0.0)):  # the white sets it off from the bar
            axes.errorbar(
                centers, after, [below, above], fmt="none", ecolor=ink, capsize=4 + extra / 2,
                elinewidth=1.2 + extra, capthick=1.2 + extra, zorder=3,
            )  # fmt: skip
        for center, result in zip(centers, method.tasks, strict=True):
            axes.annotate(
                f"{100 * result.after:.1f}", (center, result.interval[1]), (0, 3),
                textcoords="offset points", ha="center", fontsize=10,
            )  # fmt: skip
        axes.plot(
            centers, [task.before for task in method.tasks], "v", color="white",
            markeredgecolor="black", markersize=8, zorder=4,
        )  # fmt: skip
    for index, task in enumerate(tasks):
        axes.plot(
            [index - 0.45, index + 0.45], [report.majority[task]] * 2, "--", color="black",
            linewidth=1.2, zorder=3,
        )  # fmt: skip
    axes.set_xticks(range(len(tasks)), tasks, fontsize=11)
    axes.tick_params(axis="x", length=0)
    highs = [task.interval[1] for method in report.methods for task in method.tasks]
    axes.set_ylim(0, 1.12 * max(*highs, *report.majority.values()))  # room for the numbers
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title("accuracy on held-out texts", fontsize=11)
    _tidy(axes)
    axes.grid(visible=False, axis="x")


def _draw_sizes(axes: Axes, methods: list[MethodResult]) -> None:
    """Points, not bars: on a logarithmic axis the length of a bar means nothing."""
    counts = [method.trained for method in methods]
    axes.set_xscale("log")
    for row, method in enumerate(methods):
        color, _, _, marker = STYLES[method.method]
        axes.plot(method.trained, row, marker, color=color, markersize=11, label=method.label)
        axes.annotate(
            f"{method.trained:,} ({share(method)})", (method.trained, row), (0, 12),
            textcoords="offset points", ha="center", fontsize=10,
        )  # fmt: skip
    axes.set_xlim(min(counts) / 10, max(counts) * 10)  # room for the numbers
    axes.set_ylim(len(methods) - 0.5, -0.6)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_yticks(range(len(methods)), [method.label for method in methods])
    axes.set_title("parameters trained for each task (log scale)", fontsize=11)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.15)
    axes.set_axisbelow(True)
