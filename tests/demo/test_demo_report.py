"""The demo's report: as JSON, as text, as a picture."""

import json
from pathlib import Path

import pytest
from canned import canned_report

from adapterkern.cli.demo import findings, plot


def test_report_survives_json():
    original = canned_report()
    assert findings.Report.from_json(original.to_json()) == original


def test_report_of_another_format_is_refused():
    data = json.loads(canned_report().to_json())
    with pytest.raises(ValueError, match="format 1, got 99"):
        findings.Report.from_json(json.dumps({**data, "format": 99}))


def test_report_text_is_an_aligned_table_with_the_baseline_beside_the_accuracies():
    lines = findings.as_text(canned_report()).splitlines()
    table = lines[4:10]
    ends = {line.rfind("MiB") for line in table if "MiB" in line}
    assert len(ends) == 1
    assert "10.5%" in table[2]
    assert "1.00%" in table[3]
    assert "9.0%  70.0%" in table[3]
    assert any("no claim about speed" in line for line in lines)
    assert "\x1b" not in "".join(lines)


def test_report_names_a_failed_check():
    failed = canned_report()
    failed.checks.append(findings.Check("bits", False, "other logits"))
    assert not failed.passed
    assert "FAILED  bits" in findings.as_text(failed)


def test_plot_draws_curves_and_bars(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "report.png"
    findings.write_atomically(path, lambda scratch: plot.plot_report(canned_report(), scratch))
    pixels = imread(path)[..., :3]
    assert pixels.shape[:2] == (1040, 1430)
    for color, _, _ in plot.STYLES.values():
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(axis=-1) < 0.02).sum() > 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.png"]


def test_moving_mean_is_centred_and_shorter_at_the_ends():
    losses = [float(i) for i in range(30)]
    means = plot.moving_mean(losses)
    assert means[15] == 15.0
    assert means[0] == sum(range(plot.REACH + 1)) / (plot.REACH + 1)
    assert plot.moving_mean([2.0]) == [2.0]


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        findings.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
