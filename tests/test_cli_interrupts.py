"""What a command says when a signal ends it, at any moment, and that nothing of it stays."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapterkern.cli import info, interrupts
from adapterkern.cli.main import main

ROOT = Path(__file__).parents[1]
# 4 cases of Triton in its interpreter, 12 of the reference, each backend in a process of its own.
WORDS = ["check", "--quick", "--device", "cpu", "--backend", "triton", "--backend", "reference"]
WORDS += ["--dtype", "fp32", "--dtype", "fp64", "--case", "fp32-*elu*", "--case", "fp64-*"]
CASES = 16
# The package is imported once. For each line that it reads, a run of `check` in a session of its
# own, as a shell starts one; the parent prints the run's process id, and at its end the exit code.
RUNS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
from adapterkern.cli import check
from adapterkern.cli.main import main
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.setsid()
        with open(line.split()[0], "w") as out, open(line.split()[1], "w") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w")
        code = main(line.split()[2:])
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(autouse=True)
def interrupts_as_in_a_terminal():
    """A shell that starts pytest in the background has SIGINT ignored, which is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def members(session: int) -> list[int]:
    """The processes of a session that are not zombies, by /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, NotADirectoryError):
            continue
        if entry.name.isdecimal() and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


class Runs:
    """Runs of `check`, one after another, by the program above."""

    def __init__(self, folder: Path) -> None:
        self.out, self.err = folder / "out", folder / "err"
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUNS],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *words: str) -> int:
        for path in (self.out, self.err):
            path.write_text("")
        self.process.stdin.write(" ".join([str(self.out), str(self.err), *words]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait_for_lines(self, count: int) -> None:
        late = time.monotonic() + 300
        while len(self.out.read_text().splitlines()) < count:
            assert time.monotonic() < late, self.err.read_text()
            time.sleep(0.002)

    def code(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    started = Runs(tmp_path_factory.mktemp("runs"))
    with started.process:
        yield started
        started.process.stdin.close()


@pytest.fixture(scope="module")
def runs_of_check(runs):
    pytest.importorskip("triton")
    return runs


def moments() -> list[tuple[int, float, int]]:
    """Ten of a run: after this many of its lines, and so many seconds more, comes that signal.

    The first three lines come before any process, the fourth with Triton's; the ninth is the
    reference's, whose process starts after the eighth, and whose cases are over in no time.
    """
    chance = random.Random(17)
    lines = [*chance.choices(range(1, 4), k=3), *chance.choices(range(4, 8), k=4), 8, 8, 9]
    signals = [signal.SIGINT, signal.SIGTERM] * 5
    chance.shuffle(signals)
    longest = {8: 1.0, 9: 0.0}
    return [
        (line, chance.uniform(0, longest.get(line, 0.5)), number)
        for line, number in zip(lines, signals, strict=True)
    ]


def send(number: int, run: int) -> None:
    """As a terminal sends Ctrl-C, to all processes of the run; others to the command alone."""
    (os.killpg if number == signal.SIGINT else os.kill)(run, number)


def assert_none_stays(run: int) -> None:
    late = time.monotonic() + 5  # for the kernel
    while members(run) and time.monotonic() < late:
        time.sleep(0.01)
    assert members(run) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.sweep("number")
@pytest.mark.parametrize(
    ("lines", "delay", "number"),
    moments(),
    ids=lambda value: f"{value:.2f}" if isinstance(value, float) else str(int(value)),
)
def test_check_tells_at_any_moment_what_was_done_and_leaves_no_process(
    runs_of_check, lines, delay, number
):
    runs = runs_of_check
    run = runs.start(*WORDS)
    runs.wait_for_lines(lines)
    time.sleep(delay)
    begun = time.monotonic()
    send(number, run)
    assert runs.code() == 128 + number
    assert time.monotonic() - begun < 5
    assert_none_stays(run)
    said = [line for line in runs.err.read_text().splitlines() if not line.startswith("... ")]
    assert max(map(len, said)) <= 80
    sentence = re.fullmatch(
        rf"adapterkern check: stopped by {signal.Signals(number).name} after (\d+) of {CASES} "
        r"cases \((\d+) comparisons, \d+ s\): 0 missed so far; ((?:done|begun|not begun): .+)",
        " ".join(said),
    )
    assert sentence, said
    out = runs.out.read_text()
    printed = out.count("passed ")
    assert printed <= int(sentence[1]) <= printed + 1  # it may be interrupted in printing a line
    assert int(sentence[2]) == 7 * int(sentence[1])
    assert sentence[3] in {
        "not begun: triton and reference",
        *(f"begun: triton ({n} of 4 cases); not begun: reference" for n in range(4)),
        "done: triton; not begun: reference",
        *(f"done: triton; begun: reference ({n} of 12 cases)" for n in range(12)),
        "done: triton and reference",
    }


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_check_json_that_a_signal_stops_is_json_to_its_last_line(runs_of_check):
    runs = runs_of_check
    run = runs.start(*WORDS, "--json")
    runs.wait_for_lines(3)  # the backend's, and the first case's two
    send(signal.SIGINT, run)
    assert runs.code() == 130
    assert_none_stays(run)
    events = [json.loads(line)["event"] for line in runs.out.read_text().splitlines()]
    assert events[:3] == ["backend", "begin", "case"]
    assert "end" not in events  # who reads it is not told of a whole
    assert runs.err.read_text().startswith("adapterkern check: stopped by SIGINT after ")


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_more_signals_in_the_clean_up_print_no_traceback():
    """Up to the end of the process, Python's own shutdown included."""
    words = ["check", "--backend", "reference", "--device", "cpu", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "adapterkern", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert "backend" in process.stdout.readline()
        late = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < late:
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        err = process.stderr.read()
    assert process.returncode == 130
    assert err.startswith("adapterkern check: stopped by SIGINT after ")
    assert err.count("adapterkern") == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_an_interrupt_within_code_in_a_string_is_told_by_the_exit_code(tmp_path):
    """As in the body of a dataclass that an import makes, under `python -m`."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from adapterkern.cli import info\n"
        "from adapterkern.cli.main import main\n"
        "info.run = lambda arguments: exec('raise KeyboardInterrupt')\n"
        "sys.argv[1:] = ['info']\n"
        "sys.exit(main())\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stderr) == (130, "adapterkern: ended by SIGINT\n")


@pytest.fixture
def as_a_command(monkeypatch):
    """Run a function in place of `info`; return the exit code."""

    def run(function):
        monkeypatch.setattr(info, "run", lambda _arguments: function() or 0)
        return main(["info"])

    return run


def test_a_signal_in_a_held_block_comes_at_its_end(as_a_command):
    done = []

    def work():
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            done.append("the rest of the block")
        done.append("what comes after")

    assert as_a_command(work) == 130
    assert done == ["the rest of the block"]


def test_a_second_signal_does_not_interrupt_what_the_first_began(as_a_command):
    done = []

    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("cleaned up")

    assert as_a_command(work) == 130
    assert done == ["cleaned up"]


def test_a_signal_that_a_library_swallowed_can_be_sent_again(as_a_command, monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE", 0.05)
    done = []

    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            done.append("swallowed")
        time.sleep(0.1)
        signal.raise_signal(signal.SIGINT)
        done.append("never interrupted")

    assert as_a_command(work) == 130
    assert done == ["swallowed"]


@pytest.mark.parametrize(
    ("sentence", "printed"),
    [
        ("stopped after 3 of 4 steps", "stopped after 3 of 4 steps\n"),
        ("", ""),
        (None, "adapterkern: ended by SIGINT\n"),
    ],
    ids=["told", "told-by-itself", "silent"],
)
def test_main_prints_what_a_command_tells_of_its_interruption(
    as_a_command, capsys, sentence, printed
):
    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as interrupt:
            if sentence is None:
                raise
            raise interrupts.told(interrupt, sentence) from None

    assert as_a_command(work) == 130
    assert capsys.readouterr() == ("", printed)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_of_a_command_do_not_hear_its_signals():
    """Ctrl-C in a terminal goes to them too; the command ends them, and tells of it alone."""
    with interrupts.children_undisturbed():
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    try:
        status = Path(f"/proc/{child.pid}/status").read_text()
        blocked = int(re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)[1], 16)
        assert [n for n in interrupts.SIGNALS if not blocked >> (n - 1) & 1] == []
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(interrupts.SIGNALS)
    finally:
        child.kill()
        child.wait()
