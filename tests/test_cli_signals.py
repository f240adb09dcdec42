"""A signal to a command, or to pytest, ends the processes that it started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapterkern.cli import info
from adapterkern.cli.main import main

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
# What each command starts, with a process that neither ends nor heeds a closed pipe in its place.
CHECK = """
import subprocess, sys, threading
from adapterkern.cli.main import main
class Process(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__([sys.executable, "-S", "-c", "import time; time.sleep(600)"], **options)
        # Not at once: a signal between here and the caller's `with` block would find none to leave.
        threading.Timer(0.3, print, [self.pid], {"flush": True}).start()
subprocess.Popen = Process
words = ["check", "--backend", "triton", "--backend", "reference", "--device", "cpu", "--quick"]
sys.exit(main(words))
"""
TUNE = """
import sys, time
from adapterkern.backends.triton.launch_config import Device
from adapterkern.bench.compiling import Compilers, Work
from adapterkern.cli import info
from adapterkern.cli.main import main
class Hang:
    def __reduce__(self):
        return time.sleep, (600,)
def run(arguments):
    with Compilers(2, 90, Device(132, 232448)) as compilers:
        for _ in range(2):
            compilers.submit(Work(Hang(), None))
        while len(compilers._running) < 2:
            time.sleep(0.01)
        print(*[compiler.process.pid for compiler in compilers._running], flush=True)
        time.sleep(600)
info.run = run
if __name__ == "__main__":  # its processes import it
    sys.exit(main(["info"]))
"""


TESTS = """
import subprocess, sys
from test_distributed import end_with_the_parent
def start(**options):
    command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
def test_with_children():
    children = [start(preexec_fn=end_with_the_parent), *[start() for _ in range(OTHER)]]
    try:
        print(*[child.pid for child in children], file=sys.__stdout__, flush=True)
        children[-1].wait()
    finally:
        for child in children:
            child.kill()
"""


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """What starts pytest in the background may ignore SIGINT, and nohup ignores SIGHUP."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before[signal.SIGHUP] is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def signalled(command: list[str], number: int, **variables: str) -> int:
    """Send a signal to a program that has printed the process ids of its children; none stays."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    process = subprocess.Popen(
        [sys.executable, *command], env=clean | variables, stdout=subprocess.PIPE, text=True
    )
    children = []
    try:
        while not children and (line := process.stdout.readline()):
            if all(word.isdecimal() for word in line.split()):  # not of the command itself
                children = [int(word) for word in line.split()]
        assert children
        assert all(map(is_alive, children))
        process.send_signal(number)
        code = process.wait(timeout=60)
        late = time.monotonic() + 10  # for the kernel, after the parent's end
        while any(map(is_alive, children)) and time.monotonic() < late:
            time.sleep(0.01)
        assert [child for child in children if is_alive(child)] == []
        return code
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for child in filter(is_alive, children):
            os.kill(child, signal.SIGKILL)


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("program", [CHECK, TUNE], ids=["check", "tune"])
def test_a_signal_ends_a_command_with_its_processes(tmp_path, program, number):
    pytest.importorskip("triton")
    (tmp_path / "program.py").write_text(program)
    command = [str(tmp_path / "program.py")]
    code = signalled(command, number, PYTHONPATH=str(ROOT), TRITON_INTERPRET="0")
    assert code == 128 + number


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_ends_pytest_with_what_tests_started(tmp_path, number):
    """SIGKILL leaves only what the kernel was asked to end: the processes that could hang."""
    killed = number == signal.SIGKILL
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "test_fake.py").write_text(TESTS.replace("OTHER", "0" if killed else "1"))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tmp_path)]
    code = signalled(command, number, PYTHONPATH=paths)
    assert code == (-signal.SIGKILL if killed else pytest.ExitCode.INTERRUPTED)


@pytest.fixture
def by_default():
    """The handlers that a new process has, in place of those of tests/conftest.py."""
    before = {one: signal.getsignal(one) for one in SIGNALS}
    for one in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_told_by_the_exit_code_and_handlers_return(monkeypatch, by_default, number):
    before = [signal.getsignal(one) for one in SIGNALS]
    monkeypatch.setattr(info, "run", lambda arguments: signal.raise_signal(number) or 0)
    assert main(["info"]) == 128 + number
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_signal_that_the_caller_ignores_stays_ignored(monkeypatch, by_default):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(info, "run", lambda arguments: signal.raise_signal(signal.SIGHUP) or 7)
    assert main(["info"]) == 7
