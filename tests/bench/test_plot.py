"""The pictures of a made-up result: what is drawn, by the numbers in the axes."""

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.figure import Figure

from adapterkern.bench import plot, roofline
from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import Result
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
        assert list(lines) == ["triton", "plain", "adapterhub", "compile", "floor"]
        assert list(lines["triton"].get_xdata()) == [4096, 16384, 65536]
        assert axes.get_ylabel() == "us a call (cold)"
    machine = from_dict(gpu_result.header["calibration"]).machine()
    row = gpu_result.rows[0]
    first = {line.get_label(): line.get_ydata()[0] for line in panels[0].lines}
    assert first["floor"] == pytest.approx(roofline.seconds(row.case, machine) * 1e6)
    assert first["triton"] == row.time.p50


def test_without_a_gpu_there_is_no_floor_and_the_title_says_so(gpu_result, drawn, tmp_path):
    gpu_result.header |= {"device_type": "cpu", "device": "cpu (x86_64)"}
    plot.plot(gpu_result, tmp_path / "times.png")
    assert "no GPU was measured" in drawn[0].get_suptitle()
    labels = [line.get_label() for axes in drawn[0].axes for line in axes.lines]
    assert "floor" not in labels


def test_nothing_timed_is_nothing_to_draw(gpu_result, tmp_path):
    with pytest.raises(ValueError, match="no row has a time"):
        plot.plot(Result(gpu_result.header), tmp_path / "times.png")


def test_a_report_has_a_picture_a_mode_and_one_of_models(gpu_result, drawn, tmp_path):
    written = pictures.draw(gpu_result, tmp_path / "a.json")
    assert [path.name for path in written] == ["a-forward.png", "a-step.png", "a-models.png"]
    axes = drawn[2].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["block-1024 forward graph", "block-1024 step graph"]
    assert [bar.get_width() for bar in axes.patches] == [5.0, 5.0]
