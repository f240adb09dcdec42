"""The demo's picture: what it draws, read from its artists, and the file."""

from itertools import pairwise

import pytest
from canned import METHODS, canned_report
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.image import imread

from adapterkern.cli.demo import findings, plot


def axes_of(figure, title: str):
    found = [axes for axes in figure.axes if axes.get_title().startswith(title)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("seeds", [1, 5])
def test_bars_have_their_heights_and_error_bars_their_intervals(seeds):
    report = canned_report(seeds=seeds)
    report.methods[0].tasks[1].interval = [0.6, 0.8]  # not symmetric
    axes = axes_of(plot.draw(report), "accuracy")
    bars = [c for c in axes.containers if isinstance(c, BarContainer)]
    assert [[bar.get_height() for bar in group] for group in bars] == [
        [task.after for task in method.tasks] for method in report.methods
    ]
    errors = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    black = [c for c in errors if c.lines[2][0].get_color()[0].tolist() == [0, 0, 0, 1]]
    drawn = []
    for container, group in zip(black, bars, strict=True):
        (lines,) = container.lines[2]
        assert isinstance(lines, LineCollection)
        segments = lines.get_segments()
        drawn.append([segment[:, 1].tolist() for segment in segments])
        for segment, bar in zip(segments, group, strict=True):
            assert segment[:, 0] == pytest.approx(bar.get_x() + bar.get_width() / 2)
    expected = [[task.interval for task in method.tasks] for method in report.methods]
    assert drawn == [[pytest.approx(interval) for interval in one] for one in expected]
    numbers = {text.get_text() for text in axes.texts}
    assert numbers >= {"69.1", "69.7", "73.8", "65.2", "66.9", "66.5"}


def test_marks_show_the_largest_class_and_the_start():
    axes = axes_of(plot.draw(canned_report()), "accuracy")
    dashed = [line.get_ydata().tolist() for line in axes.lines if line.get_linestyle() == "--"]
    assert sorted(dashed) == [[0.105, 0.105], [0.305, 0.305]]
    starts = [line.get_ydata().tolist() for line in axes.lines if line.get_marker() == "v"]
    assert starts == [[0.091, 0.152]] * 3


def test_trained_parameters_stand_on_a_logarithmic_axis_with_their_share():
    axes = axes_of(plot.draw(canned_report()), "parameters trained")
    assert axes.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in axes.lines] == [row[0] for row in METHODS.values()]
    assert [text.get_text() for text in axes.texts] == [
        "226,368 (0.99%)", "221,184 (0.97%)", "22,565,376 (100%)",
    ]  # fmt: skip


def test_losses_are_drawn_smoothed_and_nothing_behind_them():
    report = canned_report()
    axes = axes_of(plot.draw(report), "topic: 11 classes")
    assert len(axes.lines) == 3
    for line, method in zip(axes.lines, report.methods, strict=True):
        losses = method.tasks[0].losses
        assert line.get_ydata().tolist() == plot.moving_mean(losses)
        assert _roughness(line.get_ydata()) < 0.2 * _roughness(losses)
    assert axes.get_xlabel() == "step (mean over 21 steps, fewer at the ends)"


def test_losses_of_a_few_steps_are_drawn_as_they_are_with_markers():
    report = canned_report(steps=2)
    axes = axes_of(plot.draw(report), "kind: 5 classes")
    for line, method in zip(axes.lines, report.methods, strict=True):
        assert line.get_ydata().tolist() == method.tasks[1].losses
        assert line.get_marker() == plot.STYLES[method.method][3]
    assert axes.get_xlabel() == "step"


def test_moving_mean_is_centred_and_shorter_at_the_ends():
    losses = [float(i) for i in range(48)]
    assert plot.reach(losses) == 4
    means = plot.moving_mean(losses)
    assert means[15] == 15.0
    assert means[0] == sum(range(5)) / 5
    assert plot.moving_mean([2.0]) == [2.0]


def test_title_and_caption_say_on_what_and_of_what():
    report = canned_report(seeds=5, machine={"device": "cuda:0 (NVIDIA H100)"})
    assert plot.draw(report).get_suptitle() == (
        "MiniLM-L6 on cuda:0 (NVIDIA H100): bottleneck adapters beside LoRA and full fine-tuning"
    )
    said = plot.caption(report).replace("\n", " ")
    for fact in ("1,969 docstrings", "492 held out", "120 steps of 16 texts", "seeds 0 to 4",
                 "95 %, spread over 5 seeds", "adapterkern 0.1.0", "torch 2.13.0+cpu"):  # fmt: skip
        assert fact in said
    assert "bootstrap over the 492 held-out texts" in plot.caption(canned_report()).replace(
        "\n", " "
    )


@pytest.mark.parametrize("steps", [2, 120])
@pytest.mark.parametrize("name", ["MiniLM-L6", 6 * "a-long-name-of-a-model-"])
def test_nothing_overlaps_and_nothing_is_cut_off(steps, name):
    report = canned_report(steps=steps)
    report.model["name"] = name
    figure = plot.draw(report)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    (legend,) = [legend for part in figure.subfigs for legend in part.legends]
    boxes = {"title": figure._suptitle.get_window_extent(renderer)}
    boxes["legend"] = legend.get_window_extent(renderer)
    boxes["caption"] = figure._supxlabel.get_window_extent(renderer)
    boxes |= {f"panel {i}": a.get_tightbbox(renderer) for i, a in enumerate(figure.axes)}
    for name_of, box in boxes.items():
        assert box.x0 >= -1, name_of
        assert box.x1 <= figure.bbox.x1 + 1, name_of
    for first in boxes:
        for second in boxes:
            if first < second:
                assert not boxes[first].overlaps(boxes[second]), f"{first} and {second}"
    accuracy = axes_of(figure, "accuracy")
    numbers = [text.get_window_extent(renderer) for text in accuracy.texts]
    assert all(number.y1 < accuracy.bbox.y1 for number in numbers)
    assert not any(left.overlaps(right) for left, right in pairwise(numbers))


def test_plot_writes_every_method_in_its_colour(tmp_path):
    path = tmp_path / "report.png"
    findings.write_atomically(path, lambda scratch: plot.plot_report(canned_report(), scratch))
    pixels = imread(path)[..., :3]
    assert pixels.shape[:2] == (1040, 1430)
    for color, *_ in plot.STYLES.values():
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(axis=-1) < 0.02).sum() > 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.png"]


def _roughness(values) -> float:
    return sum(abs(after - before) for before, after in pairwise(values))
