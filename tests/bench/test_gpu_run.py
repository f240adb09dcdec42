"""Whole dry runs of the gpu command: what is left whatever hangs, dies or is killed."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.__main__ import main
from benchmarks.gpu import digest, pack, processes, run, stages
from benchmarks.gpu.output import FILES, FolderError, Output
from benchmarks.gpu.pack import ROOT

COMMAND = [sys.executable, "-m", "benchmarks", "gpu", "--dry"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.thorough
def test_a_dry_run_survives_a_hang_a_dead_worker_and_a_lost_device(tmp_path):
    """One run with all three: each costs its task, and the case is tried again alone."""
    out = tmp_path / "out"
    faults = ("adapters=die", "compiled=lose", "blocks=hang")
    words = [word for fault in faults for word in ("--fault", fault)]
    done = subprocess.run(
        [*COMMAND, "--stage", "verify", "--out", str(out), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    files = list(out.iterdir())
    assert len(files) <= 8
    assert {file.name for file in files} == set(FILES) - {"tuned.json"}
    events, rows = lines_of(out / "events.jsonl"), lines_of(out / "rows.jsonl")
    steps = {e["step"]: e for e in events if e["event"] == "step"}
    assert [e["step"] for e in events if e["event"] == "step"] == [
        step.name for step in stages.steps("verify")
    ]
    passed = {name for name, step in steps.items() if step["status"] == "passed"}
    assert passed >= {"machine", "parity cuda", "parity triton", "gpu tests"}
    tasks = [(e["task"], e["status"]) for e in events if e["event"] == "task"]
    statuses = [status for _, status in tasks]
    assert [status for status in statuses if status != "done"] == ["died", "lost", "hung"]
    alone = [name for name, status in tasks if name.endswith("(reference alone)")]
    assert len(alone) == 2  # both adapter cases, on the one backend of a CPU
    assert rows[0]["record"] == "header"
    assert len(rows[0]["commit"]) == 40
    timed = [entry["content"] for entry in rows if entry["record"] == "row"]
    assert {row["provider"] for row in timed} >= {"reference", "plain"}
    assert any(entry["record"] == "model" for entry in rows)
    checks = [e for e in events if e["event"] == "check case"]
    assert {check["status"] for check in checks} == {"passed"}
    summary = (out / "summary.txt").read_text()
    assert done.stdout.rstrip().endswith(summary.rstrip())
    assert "died, failed (signal 9): \n" in summary
    assert summary.startswith("== dry run of verify on cpu")
    assert "hung, killed after" in summary
    assert len(summary) < 10_000
    first = done.stdout.splitlines()[:6]
    assert first[0].startswith("stage verify, commit ")
    assert first[3].startswith("extension: ")
    assert first[4].startswith("Triton key: ")
    result = records.load(out / "rows.jsonl")
    assert {row.provider for row in result.rows} >= {"reference", "plain"}


def marked(mark):
    """Return the processes that carry this mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.thorough
def test_a_killed_parent_leaves_its_results_and_no_process(tmp_path):
    out, mark = tmp_path / "out", uuid.uuid4().hex
    parent = subprocess.Popen(
        [*COMMAND, "--stage", "tune", "--out", str(out)],
        cwd=ROOT, env={**os.environ, "MARK": mark}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        rows = out / "rows.jsonl"
        while time.monotonic() < deadline and parent.poll() is None:
            if rows.exists() and '"record": "model"' in rows.read_text():
                break
            time.sleep(0.2)
        assert parent.poll() is None
        assert len(marked(mark)) >= 2  # itself and its worker
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 20
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert marked(mark) == []
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    assert len(list(out.iterdir())) <= 8
    assert "not finished" in (out / "summary.txt").read_text()
    result = records.load(rows)
    assert result.models
    assert result.header["finished"] is False
    events = lines_of(out / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"][:4] == [
        "machine", "card", "build", "parity",
    ]  # fmt: skip


@pytest.mark.thorough
def test_a_stopped_parent_still_writes_its_summary(tmp_path):
    out = tmp_path / "out"
    parent = subprocess.Popen(
        [*COMMAND, "--stage", "diagnose", "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not (out / "events.jsonl").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    parent.terminate()
    assert parent.wait(60) == 130
    events = [entry["event"] for entry in lines_of(out / "events.jsonl")]
    assert events[-2:] == ["interrupted", "end"]
    text = (out / "summary.txt").read_text()
    assert text.startswith("== diagnose on an unknown machine: INTERRUPTED during machine")


@pytest.fixture
def no_git(monkeypatch):
    monkeypatch.setattr(pack, "commit_of", lambda *_: None)
    monkeypatch.setattr(pack.Pack, "read", classmethod(lambda cls: None))


def test_a_tree_without_a_commit_is_refused_before_anything_runs(tmp_path, no_git, capsys):
    out = tmp_path / "out"
    assert main(["gpu", "--stage", "verify", "--dry", "--out", str(out)]) == 2
    assert "has no git commit and no pack" in capsys.readouterr().err
    assert not out.exists()


def test_a_packed_commit_stands_for_git_and_a_changed_tree_is_refused(no_git):
    packed = pack.Pack(Path("x"), "f" * 40, False, pack.digest(), ".so")
    assert run._identity(packed) == ("f" * 40, False)
    other = pack.Pack(Path("x"), "f" * 40, False, "0" * 64, ".so")
    with pytest.raises(pack.PackError, match="packed from other sources"):
        run._identity(other)


def test_a_packed_commit_goes_before_that_of_a_git_folder_that_came_along(monkeypatch):
    """A copy of the tree may have a git folder whose head is older than what was packed."""
    monkeypatch.setattr(pack, "commit_of", lambda *_: ("a" * 40, True))
    packed = pack.Pack(Path("x"), "f" * 40, False, pack.digest(), ".so")
    assert run._identity(packed) == ("f" * 40, False)
    other = pack.Pack(Path("x"), "f" * 40, False, "0" * 64, ".so")
    assert run._identity(other) == ("a" * 40, True)


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    Output(tmp_path / "new")
    with pytest.raises(FolderError, match=r"holds an earlier run \(events.jsonl"):
        Output(tmp_path / "new")
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(FolderError, match="cannot write to"):
        Output(blocker / "x")


def test_a_stale_pack_beside_git_is_left_out_and_said(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    stale = pack.Pack(tmp_path, "f" * 40, False, "0" * 64, ".so")
    monkeypatch.setattr(pack.Pack, "read", classmethod(lambda cls: stale))
    monkeypatch.setattr(pack.Pack, "unpack", stop)
    monkeypatch.setattr(run._Stage, "sampler", stop)  # the first thing after it
    said = []
    with pytest.raises(Stop):
        run.run(run.Options("verify", tmp_path / "out", dry=False), said.append)
    assert said == [f"{pack.FOLDER} was packed from other sources than this tree and is left out"]
    fresh = pack.Pack(tmp_path, "f" * 40, False, pack.digest(), ".so")
    monkeypatch.setattr(pack.Pack, "read", classmethod(lambda cls: fresh))
    unpacked = []
    monkeypatch.setattr(pack.Pack, "unpack", lambda self, *_: unpacked.append(self))
    with pytest.raises(Stop):
        run.run(run.Options("verify", tmp_path / "other"), said.append)
    assert unpacked == [fresh]
    assert len(said) == 1


@pytest.mark.parametrize(("key", "told"), [("here", 0), ("another", 1), (None, 0)])
def test_a_run_takes_the_kernels_of_its_pack_and_says_if_they_are_of_no_use(tmp_path, key, told):
    said = []
    output = Output(tmp_path / "out", said.append)
    packed = pack.Pack(tmp_path, "c" * 40, False, "d", ".so", triton=key)
    options = run.Options("verify", tmp_path)
    stage = run._Stage(options, output, 0.0, tmp_path, {"{python}": (sys.executable,)}, packed)
    code = "import os; print('cache', os.environ.get('TRITON_CACHE_DIR') == %r)"
    child = stage._child("machine", ("{python}", "-c", code % str(pack.CACHE)), {})
    processes.watch([child], time.monotonic() + 20)
    assert f"cache {key is not None}" in (tmp_path / "out" / "log.txt").read_text()
    stage._take(child, "out", '{"header": {"triton_key": "here"}}')
    assert len(said) == told
    assert all(key in line for line in said)


def test_clocks_that_nobody_samples_are_a_problem_that_is_said(tmp_path):
    output = Output(tmp_path / "out", lambda _text: None)
    stage = run._Stage(run.Options("verify", tmp_path), output, 0.0, tmp_path, {})
    sampler = stage._child("nvidia-smi", ("/no/such/nvidia-smi",), {})
    sampler.process.wait()
    stage.end_sampler(sampler)
    (event,) = output.events
    assert event["status"] == "failed (code 1)"
    assert "No such file" in event["says"]
    text = digest.summary(output.events, [], tmp_path)
    assert "  clocks, nvidia-smi: failed (code 1), FileNotFoundError" in text


def test_a_fault_goes_with_a_dry_run_only(tmp_path, capsys):
    command = ["gpu", "--stage", "verify", "--out", str(tmp_path / "x"), "--fault", "blocks=die"]
    assert main(command) == 2
    assert "--fault goes with --dry" in capsys.readouterr().err
    assert main([*command, "--dry", "--fault", "parity cuda=die"]) == 2
    assert (
        "--fault parity cuda: no such step has a worker in this stage (calibration, adapters"
        in (capsys.readouterr().err)
    )
    for words in (["--seconds", "abc"], ["--tokens", "-5"], ["--fault", "blocks=melt"]):
        with pytest.raises(SystemExit):
            main([*command, *words])
    err = capsys.readouterr().err
    assert "must be a positive number, got abc" in err
    assert "must be at least 1, got -5" in err
    assert "must be STEP=hang|die|lose, got blocks=melt" in err


def test_a_step_that_fails_its_check_fails_though_the_process_ended_well(tmp_path):
    output = Output(tmp_path / "out", lambda _text: None)
    words = {"{python}": (sys.executable,)}
    stage = run._Stage(run.Options("verify", tmp_path), output, 0.0, tmp_path, words)
    code = 'print(\'{"event": "end", "passed": false, "comparisons": 3}\')'
    step = stages.Commands("check", 30, {"one": ("{python}", "-c", code)})
    assert stage._run(step, time.monotonic() + 30) == "failed"
    assert output.events[0]["event"] == "check end"


@pytest.mark.thorough
def test_a_hang_in_a_parity_check_names_its_case(tmp_path):
    output = Output(tmp_path / "out", lambda _text: None)
    words = {"{python}": (sys.executable,)}
    stage = run._Stage(run.Options("verify", tmp_path), output, 0.0, tmp_path, words)
    code = (
        "import json, time; "
        "say = lambda **event: print(json.dumps({**event, 'backend': 'cuda'}), flush=True); "
        "say(event='backend', cases=2); say(event='begin', case='one'); "
        "say(event='case', case='one', status='passed'); say(event='begin', case='two'); "
        "time.sleep(600)"
    )
    step = stages.Commands("parity", 30, {"cuda 1/1": ("{python}", "-c", code)})
    assert stage._run(step, time.monotonic() + 3) == "failed"
    (command,) = [event for event in output.events if event["event"] == "command"]
    assert command["status"] == "out of time"
    assert command["says"].startswith("during two; ")
    text = digest.summary(output.events, [], tmp_path)
    assert "parity, cuda: 1 passed, 1 not reached" in text


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """(steps) -> a stage that runs them, and what it said of each."""

    def run_all(*steps, seconds=60.0):
        output = Output(tmp_path / "out", lambda _text: None)
        monkeypatch.setattr(stages, "steps", lambda *_: list(steps))
        words = {"{python}": (sys.executable,)}
        options = run.Options("verify", tmp_path)
        stage = run._Stage(options, output, time.monotonic() + seconds, tmp_path, words)
        passed = stage.run_steps()
        found = {e["step"]: e["status"] for e in output.events if e["event"] == "step"}
        return stage, passed, found

    return run_all


def command(name, limit, code):
    return stages.Commands(name, limit, {name: ("{python}", "-c", code)})


HEADER = (
    "import json; extension = {'problem': 'none'}; "
    "print(json.dumps({'header': {'extension': extension, 'versions': {}}}))"
)


@pytest.mark.thorough
def test_a_step_may_take_what_those_before_it_saved(staged):
    quick, long = command("quick", 20, "pass"), command("long", 1, "import time; time.sleep(4)")
    stage, passed, found = staged(quick, long)
    assert (passed, found) == (True, {"quick": "passed", "long": "passed"})
    assert stage.finished


@pytest.mark.thorough
def test_a_step_ends_when_the_limits_up_to_it_are_over(staged):
    long = command("long", 2, "import time; time.sleep(60)")
    began = time.monotonic()
    stage, passed, found = staged(long, command("next", 5, "pass"))
    assert time.monotonic() - began < 20
    assert (passed, found) == (False, {"long": "failed", "next": "passed"})
    assert not stage.finished  # a check that did not end is none


def test_what_no_time_is_left_for_is_said_and_the_run_not_finished(staged):
    stage, passed, found = staged(command("late", 5, "pass"), seconds=1.0)
    assert (passed, stage.finished, found) == (False, False, {"late": "not run"})


@pytest.mark.thorough
def test_a_machine_that_told_its_facts_is_measured_though_its_end_was_late(staged):
    code = f"{HEADER}; import sys; sys.stdout.flush(); import time; time.sleep(60)"
    _, _, found = staged(command("machine", 3, code), command("next", 5, "pass"))
    assert found == {"machine": "failed", "next": "passed"}


def test_nothing_is_measured_on_a_machine_that_nobody_knows(staged):
    _, passed, found = staged(command("machine", 9, "exit(2)"), command("next", 5, "pass"))
    assert (passed, found) == (False, {"machine": "failed"})
