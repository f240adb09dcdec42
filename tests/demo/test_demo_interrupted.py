"""A signal at any moment of the demo: a sentence, the exit code, and nothing half-done."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapterkern.cli.demo.story import Story

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds for a whole run, which takes two on an idle machine
SAVED = {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "task.json"}
# What every run needs is imported once, and the texts are read once. For each line that it reads, a
# run of the demo in a session of its own; the parent prints its process id, then its exit code.
RUNS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
from adapterkern.cli.demo import corpus, experiment, wording
from adapterkern.cli.main import main
texts = corpus.load_corpus()
experiment.load_corpus = lambda: texts
for line in sys.stdin:
    out, err, *words = line.split()
    child = os.fork()
    if not child:
        os.setsid()
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
        code = main(words)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def start(tiny_model, tmp_path_factory):
    """Starts a run that writes to a folder: its process id, its stderr, and a wait for its end."""
    logs = tmp_path_factory.mktemp("logs")
    server = subprocess.Popen(
        [sys.executable, "-c", RUNS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def start(out: Path):
        err = logs / "err"
        err.write_text("")
        words = f"demo --quick --steps=6 --batch-size=4 --device=cpu --model={tiny_model}"
        print(logs / "out", err, words, f"--out={out}", file=server.stdin, flush=True)
        child = int(server.stdout.readline())
        return child, err, lambda: int(server.stdout.readline())

    yield start
    server.stdin.close()
    server.wait(LIMIT)


def phases(err: Path) -> list[str]:
    """The lines with which a run's phases began; the others hold a count of steps."""
    return [line for line in err.read_text().splitlines() if not re.search(r" \d+ s$", line)]


def members(session: int) -> list[str]:
    """The processes of a session, by /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(entry.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by /proc")
@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.thorough)])
def test_a_signal_at_any_moment_leaves_a_sentence_and_nothing_else(start, tmp_path, count):
    _, err, wait = start(tmp_path / "whole")
    assert wait() == 0
    titles = phases(err)
    draws = random.Random(17)
    # Behind the last there is no time.
    moments = sorted(draws.sample(range(len(titles) - 1), count))
    for place, number in zip(moments, [signal.SIGINT, signal.SIGTERM] * 5, strict=False):
        out = tmp_path / f"{place}" / "out"
        child, err, wait = start(out)
        end = time.monotonic() + LIMIT
        while len(phases(err)) <= place and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.03))
        os.kill(child, number)
        said = f"{number.name} behind {titles[place]!r}"
        assert wait() == 128 + number, said
        assert members(child) == [], said
        last = " ".join(err.read_text().rpartition("adapterkern demo: ")[2].split())
        told = re.fullmatch(
            rf"stopped while (.+) after \d+ s; finished: (.+); (.+) written to {out}", last
        )
        assert told, (said, last)
        if not out.exists():
            assert told[3] == "nothing", said
            assert not out.parent.exists(), said  # the run made it as well
            continue
        assert not list(out.rglob(".writing-*")), said
        assert set(os.listdir(out)) <= {"adapters", "report.json", "report.png"}, said
        for folder in (out / "adapters").iterdir():
            assert set(os.listdir(folder)) == SAVED, said
        for name in told[3].split(", "):
            assert (out / name).exists(), said


def test_a_story_keeps_what_was_there_before(tmp_path):
    old = tmp_path / "out" / ".writing-of-another"
    old.mkdir(parents=True)
    story = Story(tmp_path / "out")
    story.make_folder()
    (tmp_path / "out" / ".writing-mine").mkdir()
    (tmp_path / "out" / ".writing-mine" / "half").write_text("half")
    story.tidy()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [old.name]


def test_a_story_removes_the_empty_folders_that_it_made(tmp_path):
    story = Story(tmp_path / "new" / "out")
    story.make_folder()
    assert (tmp_path / "new" / "out").is_dir()
    story.tidy()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_a_story_tells_what_is_finished_and_written(tmp_path):
    story = Story(tmp_path)
    story.start -= 38
    assert story.sentence("reading") == (
        f"stopped while reading after 38 s; finished: nothing; nothing written to {tmp_path}"
    )
    story.finished += ["reading the texts", "the checks"]
    story.written += ["adapters/topic"]
    assert story.sentence("timing steps, step 3 of 8") == (
        "stopped while timing steps, step 3 of 8 after 38 s; finished: reading the texts, the "
        f"checks; adapters/topic written to {tmp_path}"
    )
