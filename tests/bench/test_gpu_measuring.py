"""The measuring worker's parent, with a worker that measures nothing and fails on request."""

import json
import os
import sys
import time

import pytest

from benchmarks.gpu import measuring, workload
from benchmarks.gpu.measuring import Measuring, Task
from benchmarks.gpu.output import Output
from benchmarks.gpu.pack import ROOT

WORKER = """
import json, os, signal, sys, time
def reply(kind, **content):
    print(json.dumps({"reply": kind, **content}), flush=True)
if "broken" in sys.argv:
    sys.exit("no such device")
reply("ready")
print("imported")
for line in sys.stdin:
    request = json.loads(line)
    act = request.get("act")
    bad = set(request.get("backends", ["triton", "cuda"])) & set(request.get("bad", []))
    if act == "hang" or (act == "hang with" and bad):
        time.sleep(600)
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "lose":
        reply("lost", note="illegal memory access")
        sys.exit(1)
    if act == "fail":
        reply("done", status="failed", note="out of memory")
        continue
    content = {"kind": "row", "content": {"pid": os.getpid(), "request": request}}
    reply("record", content=content)
    reply("done", status="done", note="")
"""


@pytest.fixture
def output(tmp_path):
    made = Output(tmp_path / "out", lambda _text: None)
    made.record("header", backends=["triton", "cuda"])
    return made


@pytest.fixture
def measure(output, tmp_path, monkeypatch):
    monkeypatch.setattr(Task, "limit", property(lambda task: 2.0 if task.seconds < 1 else 20.0))
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    parents = []

    def run(*tasks, seconds=60.0, words=()):
        command = [sys.executable, str(script), *words]
        parents.append(Measuring(output, command, os.environ, ROOT))
        return parents[-1].run(tasks, time.monotonic() + seconds)

    yield run
    for parent in parents:
        parent.close()


def statuses(output):
    return [(e["task"], e["status"]) for e in output.events if e["event"] == "task"]


def rows(output):
    return [entry["content"] for entry in output.records if entry["record"] == "row"]


def test_tasks_are_done_in_order_in_one_worker(measure, output):
    output.record("calibration", values={"copy_bandwidth": 3e12})
    assert measure(Task("a", 1, {"do": "x"}), Task("b", 1, {"do": "y"}))
    assert statuses(output) == [("a", "done"), ("b", "done")]
    assert [row["request"]["do"] for row in rows(output)] == ["x", "y"]
    assert {row["request"]["calibration"]["copy_bandwidth"] for row in rows(output)} == {3e12}
    assert len({row["pid"] for row in rows(output)}) == 1
    text = (output.folder / "log.txt").read_text()
    assert "[worker] imported" in text
    written = [json.loads(line) for line in (output.folder / "rows.jsonl").open()]
    assert written == output.records
    assert [e["status"] for e in written if e["record"] == "task"] == ["done", "done"]


def test_a_task_that_fails_costs_itself_alone(measure, output):
    assert not measure(Task("a", 1, {"act": "fail"}), Task("b", 1))
    assert statuses(output) == [("a", "failed"), ("b", "done")]
    assert output.events[0]["note"] == "out of memory"


@pytest.mark.parametrize(("act", "status"), [("hang", "hung"), ("die", "died"), ("lose", "lost")])
def test_a_worker_that_is_lost_is_started_anew(measure, output, act, status):
    assert not measure(Task("a", 1), Task("bad", 0.5, {"act": act}), Task("c", 1))
    assert statuses(output) == [("a", "done"), ("bad", status), ("c", "done")]
    assert len({row["pid"] for row in rows(output)}) == 2
    note = next(e["note"] for e in output.events if e.get("task") == "bad")
    says = {"hung": "killed after", "died": "failed (signal 9)", "lost": "illegal memory access"}
    assert note.startswith(says[status])


@pytest.mark.thorough
def test_a_case_that_hangs_is_tried_once_for_each_backend_alone(measure, output):
    request = {"do": "adapter", "act": "hang with", "bad": ["cuda"], "baselines": ["plain", "lora"]}
    assert not measure(Task("case", 0.5, request), Task("next", 1))
    assert statuses(output) == [
        ("case", "hung"),
        ("case (triton alone)", "done"),
        ("case (cuda alone)", "hung"),
        ("next", "done"),
    ]
    alone = rows(output)[0]["request"]
    assert (alone["backends"], alone["baselines"]) == (["triton"], ["plain", "limit"])


def test_what_the_time_does_not_hold_is_not_begun(measure, output):
    assert not measure(Task("long", 1e4), Task("short", 1))
    assert statuses(output) == [("long", "not run"), ("short", "done")]
    assert output.events[0]["note"] == measuring.OUT_OF_TIME


@pytest.mark.thorough
def test_what_the_step_cuts_is_no_hang_and_is_not_tried_again(measure, output):
    began = time.monotonic()
    request = {"do": "adapter", "act": "hang", "baselines": []}
    assert not measure(Task("long", 1, request), Task("next", 3), seconds=8.0)
    assert time.monotonic() - began < 15
    assert statuses(output) == [("long", "cut"), ("next", "not run")]
    assert {event["note"] for event in output.events} == {measuring.OUT_OF_TIME}


def test_a_worker_that_does_not_start_is_said(measure, output):
    assert not measure(Task("a", 1), words=["broken"])
    assert statuses(output) == [("a", "died")]
    assert output.events[0]["note"] == "the worker did not start: no such device"


def test_a_batch_of_many_adapters_is_narrowed_beside_a_single_one():
    for task, beside in ((workload.MANY[0], "single"), (workload.REPORTED[0], "plain")):
        request = task.narrowed("cuda").request
        assert (request["backends"], request["baselines"]) == (["cuda"], [beside, "limit"])
        assert request["case"] == task.request["case"]
