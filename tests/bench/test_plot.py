"""The pictures of a made-up result: what is drawn, by the numbers in the axes."""

import sys
from types import ModuleType

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure

from adapterkern.bench import plot, roofline
from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import Result, Timing
from benchmarks import pictures


@pytest.fixture
def drawn(monkeypatch):
    """The figures in the order in which they were saved."""
    figures = []
    savefig = Figure.savefig

    def save(self, *arguments, **options):
        figures.append(self)
        savefig(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def test_a_panel_shows_every_provider_and_the_floor(gpu_result, drawn, tmp_path):
    plot.plot(gpu_result, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in drawn[0].axes if axes.axison]
    assert [axes.get_title() for axes in panels] == [
        f"{mode}, H {hidden}, R {bottleneck}, bf16"
        for hidden, bottleneck in ((768, 48), (1024, 64))
        for mode in ("forward", "step")
    ]
    for axes in panels:
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == ["adapterkern (triton)", "plain", "adapterhub", "compile", "floor"]
        assert list(lines["adapterkern (triton)"].get_xdata()) == [4096, 16384, 65536]
        assert axes.get_ylabel() == "us a call (cold)"
    machine = from_dict(gpu_result.header["calibration"]).machine("bf16")
    row = gpu_result.rows[0]
    first = {line.get_label(): line.get_ydata()[0] for line in panels[0].lines}
    assert first["floor"] == pytest.approx(roofline.seconds(row.case, machine) * 1e6)
    assert first["adapterkern (triton)"] == row.time.p50


def test_a_line_breaks_where_the_kind_of_timing_changes(gpu_result, drawn, tmp_path):
    for row in gpu_result.rows:
        if row.case.tokens == 4096:
            row.headline, row.timings = "graph", {"graph": row.timings["cold"]}
    plot.plot(gpu_result, tmp_path / "times.png")
    for axes in drawn[0].axes[:4]:
        lines = {line.get_label(): line for line in axes.lines}
        few, many = lines["adapterkern (triton)"], lines["_adapterkern (triton)"]
        assert list(few.get_xdata()) == [4096]
        assert list(many.get_xdata()) == [16384, 65536]
        assert few.get_color() == many.get_color()
        assert list(lines["_graph | cold"].get_xdata()) == [8192, 8192]
        assert [text.get_text() for text in axes.texts] == ["graph", "cold"]
        assert axes.get_ylabel() == "us a call (graph, cold)"
    shown = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert shown == ["adapterkern (triton)", "plain", "adapterhub", "compile", "floor"]


def test_without_a_measured_copy_there_is_no_floor(gpu_result, drawn, tmp_path):
    del gpu_result.header["calibration"]["copy_bandwidth"]
    plot.plot(gpu_result, tmp_path / "times.png")
    labels = {line.get_label() for axes in drawn[0].axes for line in axes.lines}
    assert labels == {"adapterkern (triton)", "plain", "adapterhub", "compile"}


def test_what_cannot_be_drawn_into_is_refused_with_the_suffixes(tmp_path, monkeypatch):
    assert plot.refusal(tmp_path / "a.PNG") is None
    assert plot.refusal(tmp_path / "a.svg") is None
    for name in ("a.xyz", "a"):
        assert ".pdf, .pgf, .png" in plot.refusal(tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", Broken("matplotlib"))
    refused = plot.refusal(tmp_path / "a.png")
    assert refused.startswith("matplotlib cannot be imported (RuntimeError: compiled against")


class Broken(ModuleType):
    def __getattr__(self, name):
        raise RuntimeError("compiled against another numpy")


def test_without_a_gpu_there_is_no_floor_and_the_title_says_so(gpu_result, drawn, tmp_path):
    gpu_result.header |= {"device_type": "cpu", "device": "cpu (x86_64)"}
    plot.plot(gpu_result, tmp_path / "times.png")
    assert "no GPU was measured" in drawn[0].get_suptitle()
    labels = [line.get_label() for axes in drawn[0].axes for line in axes.lines]
    assert "floor" not in labels


def test_one_number_of_tokens_is_drawn_as_bars_with_their_spread(gpu_result, drawn, tmp_path):
    gpu_result.rows = [row for row in gpu_result.rows if row.case.tokens == 4096]
    for row in gpu_result.rows:  # to milliseconds, and one with a spread beyond the picture
        time = row.time.p50 * 1e3
        wide = 5 if row.provider == "compile" else 1.1
        row.timings = {"cold": Timing(0.9 * time, time, wide * time, 9)}
    plot.plot(gpu_result, tmp_path / "times.png")
    axes = drawn[0].axes[0]
    assert axes.get_title() == "forward, 4,096 tokens, H 768, R 48, bf16"
    assert axes.get_xlabel() == "ms a call (cold)"
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["adapterkern (triton)", "plain", "adapterhub", "compile"]
    assert axes.yaxis_inverted()  # so that the first is on top
    medians = [row.time.p50 / 1e3 for row in gpu_result.rows[:4]]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(medians)
    assert [text.get_text() for text in axes.texts] == [f"{median:.3g} ms" for median in medians]
    left, end = axes.get_xlim()
    assert left == 0
    assert end < 2.01 * max(medians) < 5 * medians[3]
    assert [line.get_marker() for line in axes.lines].count(">") == 1
    floor = next(line for line in axes.lines if line.get_label() == "floor")
    assert floor.get_xdata()[0] == pytest.approx(gpu_result.rows[0].floor_us / 1e3)


def test_lines_that_would_be_points_are_bars_of_each_number_of_tokens(gpu_result, drawn, tmp_path):
    gpu_result.rows = [
        row for row in gpu_result.rows if row.case.tokens < 65536 and row.case.hidden_size == 768
    ]
    for row in gpu_result.rows:
        if row.case.tokens == 4096:
            row.headline, row.timings = "graph", {"graph": row.timings["cold"]}
    plot.plot(gpu_result, tmp_path / "times.png")
    assert [(axes.get_title(), axes.get_xlabel()) for axes in drawn[0].axes] == [
        (f"{mode}, {tokens} tokens, H 768, R 48, bf16", f"us a call ({kind})")
        for mode in ("forward", "step")
        for tokens, kind in (("4,096", "graph"), ("16,384", "cold"))
    ]


def test_the_caption_has_versions_commit_day_and_what_is_drawn(gpu_result, drawn, tmp_path):
    plot.plot(gpu_result, tmp_path / "times.png")
    assert drawn[0].get_supxlabel() == (
        "adapterkern 0.1.0, torch 2.9.0, triton 3.5.0, commit 012345678, 2026-01-02\n"
        "median of the calls, and the 20th to the 80th percentile; "
        "floor: what memory and products allow at least"
    )


def test_lines_have_the_unit_of_their_panel(gpu_result, drawn, tmp_path):
    for row in gpu_result.rows:
        time = row.time.p50 * 1e3
        row.timings = {"cold": Timing(time, time, time, 9)}
    plot.plot(gpu_result, tmp_path / "times.png")
    axes = drawn[0].axes[0]
    assert axes.get_ylabel() == "ms a call (cold)"
    assert axes.lines[0].get_ydata()[0] == pytest.approx(gpu_result.rows[0].time.p50 / 1e3)


def test_nothing_timed_is_nothing_to_draw(gpu_result, tmp_path):
    with pytest.raises(ValueError, match="no row has a time"):
        plot.plot(Result(gpu_result.header), tmp_path / "times.png")


def test_a_report_has_a_picture_a_mode_and_one_a_family_of_models(gpu_result, drawn, tmp_path):
    written, problems = pictures.draw(gpu_result, tmp_path / "a")
    assert [path.name for path in written] == ["a-forward.png", "a-step.png", "a-models-block.png"]
    assert problems == []
    for axes, mode in zip(drawn[2].axes, ("forward", "step"), strict=True):
        assert axes.get_title() == mode
        assert [label.get_text() for label in axes.get_yticklabels()] == ["block-1024 graph"]
        assert [bar.get_width() for bar in axes.patches] == [5.0]
