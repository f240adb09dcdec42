"""Children of a run: their lines, their limits, and that nothing of them outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import processes
from benchmarks.gpu.pack import ROOT


class Lines:
    def __init__(self):
        self.found = []

    def child(self, code, name="child", **options):
        command = [sys.executable, "-c", code]
        return processes.Child(name, command, self._take, os.environ, ROOT, **options)

    def _take(self, child, stream, line):
        self.found.append((child.name, stream, line))


@pytest.fixture
def lines():
    return Lines()


def seconds_from_now(seconds):
    return time.monotonic() + seconds


def is_gone(pid):
    """Return whether a process ended; one that nobody has waited for yet counts."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_lines_come_with_their_stream_and_the_end_with_its_code(lines):
    code = (
        "import sys; print('one'); print('two', file=sys.stderr); print('three', end=''); exit(3)"
    )
    (end,) = processes.run([lines.child(code)], seconds_from_now(30))
    assert sorted(lines.found) == [
        ("child", "err", "two"),
        ("child", "out", "one"),
        ("child", "out", "three"),
    ]
    assert (end.code, end.status, str(end)) == (3, "failed", "failed (code 3)")
    assert end.last_line in ("two", "three")


@pytest.mark.thorough
def test_children_run_side_by_side_and_end_apart(lines):
    codes = ["pass", "import os; os.abort()", "import time; time.sleep(600)"]
    children = [lines.child(code, name) for code, name in zip(codes, "abc", strict=True)]
    began = time.monotonic()
    ends = processes.run(children, seconds_from_now(5))
    assert [str(end) for end in ends] == ["passed", "failed (signal 6)", "out of time"]
    assert time.monotonic() - began < 12


def test_a_child_that_hangs_is_killed_with_all_that_it_started(lines):
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); "
        "print(child.pid, flush=True); child.wait()"
    )
    (end,) = processes.run([lines.child(code)], seconds_from_now(3))
    assert (end.code, end.status) == (None, "out of time")
    assert is_gone(int(lines.found[0][2]))


def test_a_child_that_ended_is_not_waited_for_because_of_what_it_left(lines):
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    began = time.monotonic()
    (end,) = processes.run([lines.child(code)], seconds_from_now(60))
    assert end.status == "passed"
    assert time.monotonic() - began < 20
    assert is_gone(int(lines.found[0][2]))


@pytest.mark.thorough
def test_a_child_without_output_is_waited_for(lines):
    code = "import os, time; os.close(1); os.close(2); time.sleep(2)"
    (end,) = processes.run([lines.child(code)], seconds_from_now(60))
    assert end.status == "passed"
    assert end.seconds >= 2


def test_a_command_that_does_not_exist_fails_alone(lines):
    missing = processes.Child("missing", ["/no/such/tool"], lines._take, os.environ, ROOT)
    ends = processes.run([missing, lines.child("pass")], seconds_from_now(30))
    assert [end.status for end in ends] == ["failed", "passed"]
    assert "No such file" in ends[0].last_line


def test_a_child_ends_when_its_parent_is_killed():
    code = (
        "import os, sys, time; from benchmarks.gpu import processes; "
        "child = processes.Child('c', ['sleep', '600'], print, os.environ, '.'); "
        "time.sleep(1); print(child.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}/cmdline").read_text().startswith("sleep")
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert is_gone(pid)


def test_watching_ends_as_soon_as_its_condition_holds(lines):
    code = "import time; print('ready', flush=True); time.sleep(600)"
    child = lines.child(code, stdin=True)
    assert processes.watch([child], seconds_from_now(30), lambda: bool(lines.found))
    assert child.process.poll() is None
    child.kill()
    assert not child.send("anything")
