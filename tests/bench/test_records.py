"""Rows as a run wrote them: read, merged, and drawn into the README."""

import copy
import dataclasses
import json

import pytest

from adapterkern.bench import results
from adapterkern.bench.results import ResultError
from benchmarks import block_model, goals, many_model, model, pictures, readme, records, summary
from benchmarks.__main__ import main


def write(folder, result, stage="report", finished=True, **header):
    """The rows.jsonl of a run that measured `result`."""
    head = {**result.header, "record": "header", "schema": results.SCHEMA, "stage": stage, **header}
    entries = [head, {"record": "calibration", "values": result.header["calibration"]}]
    entries += [{"record": "row", "content": dataclasses.asdict(row)} for row in result.rows]
    entries += [{"record": "model", "content": dataclasses.asdict(row)} for row in result.models]
    entries.append({"record": "task", "task": "a", "status": "done", "seconds": 1.0, "note": ""})
    entries.append({"record": "end", "stage": stage, "finished": finished, "passed": finished})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_rows_come_back_as_they_were_measured(gpu_result, tmp_path):
    found = records.load(write(tmp_path, gpu_result))
    assert found.rows == gpu_result.rows
    assert found.models == gpu_result.models
    assert found.header["calibration"] == gpu_result.header["calibration"]
    assert found.header["stages"] == ["report"]
    assert [entry["task"] for entry in found.log] == ["a"]


def test_half_a_last_line_costs_that_line_alone(gpu_result, tmp_path):
    path = write(tmp_path, gpu_result)
    text = path.read_text()
    path.write_text(text[: text.rindex('{"record": "task"')] + '{"record": "row", "conte')
    found = records.load(path)
    assert found.rows == gpu_result.rows
    assert found.header["finished"] is False  # no end was written
    path.write_text(text.replace('{"record": "calibration"', '{"rec', 1))
    with pytest.raises(ResultError, match="line 2 is not JSON"):
        records.load(path)


@pytest.mark.parametrize(
    ("stage", "finished", "expected"),
    [("report", True, True), ("report", False, False), ("verify", True, False)],
)
def test_a_result_is_finished_where_a_report_is(gpu_result, tmp_path, stage, finished, expected):
    path = write(tmp_path, gpu_result, stage, finished)
    assert records.load(path).header["finished"] is expected


def test_what_is_no_record_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"record": "header", "schema": "other/1"}\n')
    with pytest.raises(ResultError, match="begins with no header of schema"):
        records.load(path)
    path.write_text("")
    with pytest.raises(ResultError, match="ended before it knew its machine"):
        records.load(path)
    with pytest.raises(ResultError, match="cannot read"):
        records.load(tmp_path / "missing.jsonl")


def test_the_last_row_with_a_time_counts_and_keeps_the_ratios_of_others(gpu_result):
    old = gpu_result.rows[0]
    new = copy.deepcopy(old)
    new.note, new.ratios = "again", {"compile": 9.0}
    untimed = copy.deepcopy(old)
    untimed.timings, untimed.status = {}, "failed"
    (kept,) = records._newest([old, new, untimed])
    assert kept.note == "again"
    assert kept.ratios == {**old.ratios, "compile": 9.0}
    (kept,) = records._newest([untimed, old])
    assert kept.status == "ok"


def test_merge_puts_runs_of_one_commit_into_one_folder(gpu_result, tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    write(first, gpu_result, "verify")
    more = copy.deepcopy(gpu_result)
    more.rows = more.rows[:3]
    for row in more.rows:
        row.note = "of the second"
    write(second, more, "report", created="2026-01-02T05:00:00+00:00")
    (first / "summary.txt").write_text("first")
    (second / "gpu.csv").write_text("second")
    into = tmp_path / "results"
    assert main(["merge", str(first), str(second), "--into", str(into)]) == 0
    folder = into / "made-up-gpu" / "2026-01-02-012345678"
    assert capsys.readouterr().out.strip() == f"{folder}: 2 runs"
    assert sorted(file.name for file in folder.iterdir()) == [
        "report-gpu.csv", "rows.jsonl", "verify-summary.txt",
    ]  # fmt: skip
    found = records.load(folder / "rows.jsonl")
    assert len(found.rows) == len(gpu_result.rows)
    assert [row.note for row in found.rows[-3:]] == ["of the second"] * 3
    assert found.header["stages"] == ["verify", "report"]
    assert found.header["finished"] is True


def test_a_later_merge_adds_to_what_is_there(gpu_result, tmp_path):
    for number, name in enumerate("abc"):
        stage = "report" if name == "c" else "verify"
        write(tmp_path / name, gpu_result, stage, created=f"2026-01-02T0{number}:00:00+00:00")
        (tmp_path / name / "summary.txt").write_text(name)
    folder, count = records.merge([tmp_path / "a"], tmp_path / "results")
    assert count == 1
    again, count = records.merge([tmp_path / "b", tmp_path / "c"], tmp_path / "results")
    assert (again, count) == (folder, 3)
    assert records.load(folder / "rows.jsonl").header["stages"] == ["verify", "verify", "report"]
    for name, of in (("verify", "a"), ("verify-2", "b"), ("report", "c")):
        assert (folder / f"{name}-summary.txt").read_text() == of
    before = (folder / "rows.jsonl").read_bytes()
    with pytest.raises(ResultError, match=r"is in .* already, or was named twice"):
        records.merge([tmp_path / "b"], tmp_path / "results")
    assert (folder / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"commit": "f" * 16}, "is of commit ffffffffffffffff"),
        ({"device": "Another GPU"}, "is of device Another GPU"),
        ({"dirty": True}, "on a tree with changes"),
        ({"device_type": "cpu"}, "was a dry run"),
    ],
)
def test_merge_refuses_what_does_not_belong_together(gpu_result, tmp_path, header, message, capsys):
    write(tmp_path / "a", gpu_result, created="2026-01-02T05:00:00+00:00")
    write(tmp_path / "b", gpu_result, **header)
    words = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--into", str(tmp_path / "c")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def page_of(name, content):
    first, last = readme.markers(name)
    return f"before\n{first}\n{content}\n{last}\nafter\n"


@pytest.fixture
def root(tmp_path):
    """A folder with the pages, whose sections hold something old."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(page_of("performance", "old"))
    (tmp_path / readme.GOALS).write_text(page_of("goals", "old"))
    (tmp_path / readme.MODEL).write_text(page_of("model", "old"))
    return tmp_path


def pages(root):
    return [(root / name).read_text() for name in ("README.md", readme.GOALS)]


def test_without_a_gpu_result_the_readme_says_so_and_the_docs_have_the_goals(gpu_result, root):
    folder = root / "benchmarks" / "results"
    write(folder / "cpu" / "a", gpu_result, device_type="cpu")
    assert readme.write(root, folder) is None
    text, docs = pages(root)
    assert text == page_of("performance", readme.NO_RESULT)
    card = model.CARDS["h200"]
    calls = model.table(list(model.predictions(card)))
    blocks = block_model.table(list(block_model.overheads(card)))
    predicted = f"{calls}\n\n{blocks}\n\n{many_model.table(list(many_model.predictions(card)))}"
    assert (root / readme.MODEL).read_text() == page_of("model", predicted)
    assert ". " not in readme.NO_RESULT  # it is one sentence
    table = summary.goals_table(results.Result())
    assert docs == page_of("goals", table)
    verdicts = goals.verdicts(results.Result())
    assert table.count("| not measured |") == len({v.goal for v in verdicts})
    assert all(v.promise in table for v in verdicts)


def test_the_readme_prefers_a_finished_h200_then_a_finished_h100(gpu_result, tmp_path):
    def add(name, device, created, finished=True):
        write(tmp_path / "gpu" / name, gpu_result, "report", finished, device=device,
              created=created)  # fmt: skip
        return readme.best(tmp_path).name

    assert readme.best(tmp_path) is None
    assert add("other", "NVIDIA A100", "2026-09-01") == "other"
    assert add("h200-cut", "NVIDIA H200", "2026-09-02", finished=False) == "other"
    assert add("h100", "NVIDIA H100 80GB HBM3", "2026-01-01") == "h100"
    assert add("h100-newer", "NVIDIA H100 80GB HBM3", "2026-01-02") == "h100-newer"
    assert add("h200", "NVIDIA H200", "2025-01-01") == "h200"
    assert add("h200-newer", "NVIDIA H200", "2025-01-02") == "h200-newer"


def test_the_section_shows_the_result_and_what_it_is_of(gpu_result, root):
    folder = root / "benchmarks" / "results" / "made-up-gpu" / "2026-01-02-012345678"
    write(folder, gpu_result)
    assert readme.write(root, root / "benchmarks" / "results") == folder
    text, docs = pages(root)
    assert "Made-up GPU, torch 2.9.0, triton 3.5.0, commit 012345678, 2026-01-02" in text
    where = "benchmarks/results/made-up-gpu/2026-01-02-012345678"
    rows = f"{readme.FILES}/{where}"
    assert f"[all rows]({rows}/report.md), [raw]({rows}/rows.jsonl)" in text
    assert f"]({readme.PICTURES}/{where}/report-forward.png)" in text
    assert (folder / "report-forward.png").exists()
    head = "| case | backend | timing | us | of copy | of peak | vs adapterhub | vs plain |"
    assert head in text
    assert "| forward-bf16-gelu-T16384-H768-R48 | triton | cold |" in text
    assert "| 82% | 72% | 3.48x | 2.50x |" in text
    assert readme.UNSTEADY not in text
    assert readme.UNFINISHED not in text
    states = [verdict.state for verdict in goals.verdicts(gpu_result)]
    for state in set(states):
        assert f"{states.count(state)} {state}" in text
    assert f"Found on Made-up GPU: [all rows](../{where}/report.md)." in docs
    assert f"\n\n{summary.goals_table(gpu_result)}\n" in docs
    report = (folder / "report.md").read_text()
    assert "- stages: report" in report
    assert "| block-1024 | adapterkern | forward | graph | 0.840 |" in report


def test_the_section_says_what_is_wrong_with_a_run(gpu_result, tmp_path):
    gpu_result.header["calibration"]["matrix_rate_after"] = 600e12
    write(tmp_path / "gpu" / "a", gpu_result, finished=False)
    _, text = readme.sections(tmp_path / "gpu" / "a", tmp_path)["README.md"]
    assert readme.UNSTEADY in text
    assert readme.UNFINISHED in text


def test_a_picture_that_cannot_be_drawn_is_not_left_out(gpu_result, root, monkeypatch):
    def broken(part, path):
        raise RuntimeError("no room")

    write(root / "gpu" / "a", gpu_result)
    monkeypatch.setattr(pictures, "plot", broken)
    before = pages(root)
    with pytest.raises(ResultError, match=r"report-forward\.png: RuntimeError: no room"):
        readme.write(root, root)
    assert pages(root) == before


def test_a_page_without_a_place_for_its_section_is_refused_and_no_page_changes(root):
    (root / readme.GOALS).write_text("# title\n")
    before = pages(root)
    with pytest.raises(readme.MarkerError, match=r"docs/benchmarks\.md .*'goals'(.|\n)*two lines"):
        readme.write(root, root)
    assert pages(root) == before


def test_the_pages_agree_with_the_best_result():
    for path, text in readme.updated(readme.best()).items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name} and the best result disagree; run `python -m benchmarks readme`"
        )


def test_a_cpu_result_meets_and_misses_nothing_and_claims_nothing(gpu_result):
    gpu_result.header["device_type"] = "cpu"
    assert {v.met for v in goals.verdicts(gpu_result)} == {None}
    text = summary.summary(gpu_result)
    assert "no GPU here" in text
    assert "over plain" not in text
