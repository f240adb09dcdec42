"""Folders that are written as a whole: readers, crashes and other files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapterkern.integrations import staging
from adapterkern.integrations.adapterhub import exchange
from adapterkern.integrations.adapterhub.exchange import written_whole

ROOT = Path(__file__).parents[2]
NAMES = ("other", "weights", "config")
WRITER = """
import sys
from pathlib import Path
from adapterkern.integrations.adapterhub.exchange import written_whole
number = 0
while True:
    number += 1
    with written_whole(sys.argv[1], ("other", "weights", "config")) as fresh:
        for name in ("weights", "config"):
            Path(fresh, name).write_text(sys.argv[2] + str(number))
    print(number, flush=True)
"""


def fill(fresh: str, text: str, *names: str) -> None:
    for name in names:
        Path(fresh, name).parent.mkdir(exist_ok=True)
        Path(fresh, name).write_text(text)


def write_half(target: Path) -> None:
    with written_whole(target, NAMES) as fresh:
        fill(fresh, "new", "weights")
        raise OSError("disk full")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(params=["exchange", "file by file", "parent read-only"])
def way(request, monkeypatch):
    if request.param == "file by file":
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    elif request.param == "parent read-only":  # as mkdtemp says so; root may write anywhere
        kept = staging.tempfile.mkdtemp

        def refuse(dir, prefix):
            if prefix != ".saving-":
                raise PermissionError(dir)
            return kept(dir=dir, prefix=prefix)

        monkeypatch.setattr(staging.tempfile, "mkdtemp", refuse)
    return request.param


def test_what_is_replaced_goes_and_all_else_stays(tmp_path, way):
    target = tmp_path / "a" / "b"
    with written_whole(target, NAMES) as fresh:
        fill(fresh, "old", "weights", "other", "config")
    fill(str(target), "mine", "notes", "within/config")
    (target / "link").symlink_to("nowhere")
    with written_whole(target, NAMES) as fresh:
        fill(fresh, "new", "weights", "config")
    assert contents(target) == {
        "weights": "new",
        "config": "new",
        "notes": "mine",
        "within/config": "mine",
    }
    assert os.readlink(target / "link") == "nowhere"
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == ["b"]
    assert not [name for name in os.listdir(target) if name.startswith(".")]


def test_an_error_leaves_everything_as_it_was(tmp_path, way):
    with written_whole(tmp_path / "old", NAMES) as fresh:
        fill(fresh, "old", "weights", "config")
    for target in (tmp_path / "old", tmp_path / "x" / "y"):
        with pytest.raises(OSError, match="disk full"):
            write_half(target)
    assert contents(tmp_path) == {"old/weights": "old", "old/config": "old"}
    assert os.listdir(tmp_path) == ["old"]


def test_the_folder_keeps_its_mode_and_a_link_to_it_stays_one(tmp_path):
    (tmp_path / "real").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("real")
    with written_whole(tmp_path / "link", NAMES) as fresh:
        fill(fresh, "new", "config")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o750
    assert contents(tmp_path / "real") == {"config": "new"}


def start(folder: Path, word: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(folder), word]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="folders change places on Linux alone")
def test_a_killed_process_leaves_a_whole_folder_and_no_litter_for_long(tmp_path):
    target = tmp_path / "a"
    with written_whole(target, NAMES) as fresh:
        fill(fresh, "first", "weights", "config")
    for delay in (0.0, 0.002, 0.005, 0.011):
        process = start(target, "x")
        try:
            assert process.stdout.readline() == "1\n"
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        found = contents(target)
        assert set(found) == {"weights", "config"}
        assert found["weights"] == found["config"]
    (tmp_path / ".a.saving-dead").mkdir()
    with written_whole(target, NAMES) as fresh:
        fill(fresh, "last", "weights", "config")
        inside = os.listdir(tmp_path)
    assert len(inside) == 2  # what the dead left is gone, what the living write is there
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="folders change places on Linux alone")
def test_two_writers_and_a_reader_never_meet_a_mixture(tmp_path):
    target = tmp_path / "a"
    writers = [start(target, word) for word in ("x", "y")]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "1\n"
        seen, late = set(), time.monotonic() + 60
        while (len(seen) < 100 or len({text[0] for text in seen}) < 2) and time.monotonic() < late:
            place = os.open(target, os.O_RDONLY)  # one and the same folder for both files
            try:
                texts = []
                for name in ("weights", "config"):
                    with open(os.open(name, os.O_RDONLY, dir_fd=place)) as file:
                        texts.append(file.read())
            except FileNotFoundError:  # it was exchanged and removed meanwhile
                continue
            finally:
                os.close(place)
            assert texts[0] == texts[1]
            seen.add(texts[0])
        assert {text[0] for text in seen} == {"x", "y"}
        assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()


def test_what_comes_while_the_folders_change_places_is_kept(tmp_path, monkeypatch):
    target, carry = tmp_path / "a", exchange._carry
    target.mkdir()

    def carry_and_add(source, *others):
        carry(source, *others)
        Path(source, "late").write_text("mine")

    monkeypatch.setattr(exchange, "_carry", carry_and_add)
    with written_whole(target, NAMES) as fresh:
        fill(fresh, "new", "config")
    assert contents(target) == {"config": "new", "late": "mine"}


def test_writers_at_work_leave_each_other_alone(tmp_path):
    with written_whole(tmp_path / "a", NAMES) as outer:
        fill(outer, "outer", "config")
        with written_whole(tmp_path / "a", NAMES) as inner:
            fill(inner, "inner", "config")
        assert contents(tmp_path / "a") == {"config": "inner"}
        assert contents(Path(outer)) == {"config": "outer"}
    assert contents(tmp_path) == {"a/config": "outer"}


def test_a_folder_that_was_swept_before_its_lock_is_made_anew(tmp_path, monkeypatch):
    kept, made = staging.tempfile.mkdtemp, []

    def make(**options):
        made.append(kept(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(staging.tempfile, "mkdtemp", make)
    with written_whole(tmp_path / "a", NAMES) as fresh:
        assert fresh == made[1]
        fill(fresh, "new", "config")
    assert contents(tmp_path / "a") == {"config": "new"}


@pytest.mark.parametrize("call", ["remove", "replace"])
def test_file_by_file_an_incomplete_folder_has_no_configuration(tmp_path, monkeypatch, call):
    fill(str(tmp_path / "a"), "old", *NAMES)
    monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    done, original = [], getattr(os, call)

    def fail_at_the_second(*paths):
        done.append(paths)
        if len(done) == 2:
            raise OSError("disk full")
        original(*paths)

    def prepare(fresh):
        fill(fresh, "new", "weights", "config")
        monkeypatch.setattr(os, call, fail_at_the_second)

    with pytest.raises(OSError, match="disk full"), written_whole(tmp_path / "a", NAMES) as fresh:
        prepare(fresh)
    assert "config" not in contents(tmp_path / "a")
