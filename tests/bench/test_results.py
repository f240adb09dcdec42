"""The result file: what is written comes back, what does not fit is refused."""

import json
from dataclasses import replace

import pytest

from adapterkern.bench import results
from adapterkern.bench.results import Result, ResultError, Row


def test_a_result_comes_back_as_it_was_written(gpu_result, tmp_path):
    path = tmp_path / "result.json"
    results.save(gpu_result, path)
    assert results.load(path) == gpu_result
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_samples_come_back_in_their_order_on_the_line_of_their_row(gpu_result, tmp_path):
    path, raw = tmp_path / "result.json", (3.25, 1.001, 2.5)
    row = gpu_result.rows[0]
    row.timings["cold"] = replace(row.timings["cold"], raw=raw)
    results.save(gpu_result, path)
    assert results.load(path).rows[0].timings["cold"].raw == raw
    (line,) = [line for line in path.read_text().splitlines() if "[3.25, 1.001, 2.5]" in line]
    assert json.loads(line.rstrip(","))["provider"] == row.provider
    assert results.SCHEMA == "adapterkern-bench/2"


def test_another_schema_version_is_refused_by_name(gpu_result, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(results.to_json(gpu_result).replace(results.SCHEMA, "adapterkern-bench/0"))
    with pytest.raises(ResultError, match=r"old\.json has schema 'adapterkern-bench/0'.*reads"):
        results.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', "nonsense"])
def test_what_is_no_result_is_refused(text):
    with pytest.raises(ResultError):
        results.from_json(text)


@pytest.mark.parametrize("change", [{"status": "great"}, {"timings": {"cold": {"p50": 1}}}])
def test_a_row_that_does_not_fit_the_schema_is_refused(gpu_result, change):
    data = json.loads(results.to_json(gpu_result))
    data["rows"][0] |= change
    with pytest.raises(ResultError, match="does not fit"):
        results.from_json(json.dumps(data))


def test_a_writer_that_fails_leaves_the_old_file(gpu_result, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    results.save(gpu_result, path)
    before = path.read_text()
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        results.save(Result({"device": "other"}), path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_an_unwritable_folder_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "cannot write to" in results.unwritable(blocker / "folder")
    assert results.unwritable(tmp_path / "new" / "folder") is None


def test_a_row_without_its_headline_timing_has_no_time(gpu_result):
    row = gpu_result.rows[0]
    assert row.time == row.timings["cold"]
    assert Row(row.case, "x", headline="graph", timings=row.timings).time is None
