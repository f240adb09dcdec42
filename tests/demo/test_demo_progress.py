"""The demo's progress: on a terminal a bar, elsewhere lines by time; and what runs, by name."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from adapterkern.cli.demo import progress
from adapterkern.cli.demo.progress import Progress

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_pipe_gets_a_line_at_the_beginning_and_one_at_the_end(capsys):
    with Progress("training", 40) as phase:
        assert lines_of(capsys) == ["training"]
        for step in range(40):
            phase.advance(f"loss {step}")
    assert lines_of(capsys) == ["training: step 40/40, loss 39, 0 s"]


def test_a_pipe_hears_of_a_slow_step_while_it_runs(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.2)
    with Progress("training", 2) as phase:
        phase.advance("loss 1.5")
        time.sleep(0.9)
    found = lines_of(capsys)[1:-1]
    assert 2 <= len(found) <= 4
    assert {re.sub(r"\d s$", "N s", line) for line in found} == {
        "training: step 1/2, loss 1.5, N s"
    }


def test_steps_without_a_total_are_counted_and_none_are_not_mentioned(capsys):
    with Progress("reading", unit="text") as phase:
        phase.advance()
        phase.advance()
        assert phase.where() == "reading, text 2"
    assert lines_of(capsys) == ["reading", "reading: text 2, 0 s"]
    with Progress("saving") as phase:
        assert phase.where() == "saving"
    assert lines_of(capsys) == ["saving"]


def test_current_names_the_phase_that_runs_or_was_interrupted():
    assert progress.current() is None
    with Progress("training", 9) as phase:
        phase.advance()
        assert progress.current() is phase
    assert progress.current() is None
    with contextlib.suppress(KeyboardInterrupt), Progress("training: topic", 9) as phase:
        phase.advance()
        raise KeyboardInterrupt
    interrupted = progress.current()
    assert interrupted is not None
    assert interrupted.where() == "training: topic, step 1 of 9"
    with Progress("the next"):
        pass
    assert progress.current() is None


BARS = """
import time
from adapterkern.cli.demo import progress
with progress.Progress("reading", unit="text") as phase:
    for _ in range(3):
        phase.advance()
with progress.Progress("training", 50) as phase:
    try:
        for step in range(50):
            phase.advance("loss 1.234")
            time.sleep(0.05 if step < 20 else 30)
    except KeyboardInterrupt:
        interrupted = True
        raise
"""
MAIN = f"""
import sys
try:
{"".join(f"    {line}" for line in BARS.splitlines(keepends=True))}
except KeyboardInterrupt:
    print("interrupted in", progress.current().where(), file=sys.stderr)
"""


def screen_of(code: str, until: bytes, columns: int = 80) -> str:
    """What a terminal shows of `code`, which gets a Ctrl-C when `until` has come."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdin=theirs)
    os.close(theirs)
    raw, signalled = b"", False
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not chunk:
            break
        raw += chunk
        if not signalled and until in raw:
            signalled = True
            time.sleep(0.7)  # into the long step
            child.send_signal(signal.SIGINT)
    os.close(ours)
    assert child.wait() == 0
    assert signalled, raw
    return raw.decode()


def test_a_terminal_has_bars_that_an_interruption_leaves_whole():
    lines = screen_of(MAIN, until=b"21/50").replace("\r\n", "\n").split("\n")
    shown = [line.split("\r")[-1].rstrip() for line in lines]  # what stays on the screen
    assert re.fullmatch(r"reading: 3 texts \[00:0\d\]", shown[0])
    assert re.fullmatch(r"training:  42%\|.*\| 21/50 \[00:0\d<00:0\d, loss 1\.234\]", shown[1])
    assert shown[2:] == ["interrupted in training, step 21 of 50", ""]
    assert all(len(part) <= 80 for line in lines for part in line.split("\r"))
    moves = lines[1].split("\r")
    assert sum("21/50" in move for move in moves) >= 2  # the clock moved within the long step
