"""A signal to a command ends the processes that it started, whatever they are at."""

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
import subprocess, sys
from adapterkern.cli.main import main
class Process(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__([sys.executable, "-S", "-c", "import time; time.sleep(600)"], **options)
        print(self.pid, flush=True)
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


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("program", [CHECK, TUNE], ids=["check", "tune"])
def test_a_signal_ends_a_command_with_its_processes(tmp_path, program, number):
    pytest.importorskip("triton")
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    children = []
    try:
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert children
        assert all(map(is_alive, children))
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        late = time.monotonic() + 10  # for the kernel, after the parent's end
        while any(map(is_alive, children)) and time.monotonic() < late:
            time.sleep(0.01)
        assert [child for child in children if is_alive(child)] == []
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for child in filter(is_alive, children):
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_told_by_the_exit_code_and_handlers_return(monkeypatch, number):
    before = [signal.getsignal(one) for one in SIGNALS]
    monkeypatch.setattr(info, "run", lambda arguments: signal.raise_signal(number) or 0)
    assert main(["info"]) == 128 + number
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_signal_that_the_caller_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(info, "run", lambda arguments: signal.raise_signal(signal.SIGHUP) or 7)
        assert main(["info"]) == 7
    finally:
        signal.signal(signal.SIGHUP, before)
