"""The pack that travels to a GPU machine knows its tree, and fits the Python there."""

import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import replace

import pytest

from benchmarks.__main__ import main
from benchmarks.gpu import pack
from benchmarks.gpu.pack import Pack, PackError

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def tree(tmp_path):
    """A source tree with one file a place."""
    root = tmp_path / "results" / "tree"  # whatever the folders above are called
    for name in ("adapterkern/a.py", "benchmarks/b.py", "csrc/c.cu", "tests/t.py", "setup.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "pyproject.toml").write_text("[project]")
    return root


@pytest.fixture
def packed(tree, tmp_path):
    folder = tmp_path / "packed"
    (folder / "wheels").mkdir(parents=True)
    (folder / "extension").mkdir()
    with zipfile.ZipFile(folder / "wheels" / "some-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/__init__.py", "found = 7")
    (folder / "extension" / f"_cuda{SUFFIX}").write_text("binary")
    (folder / "extension" / "_buildinfo.py").write_text("REASON = None")
    content = {"commit": "c" * 40, "dirty": False, "digest": pack.digest(tree), "suffix": SUFFIX}
    content["triton"] = None
    (folder / "pack.json").write_text(json.dumps(content))
    return Pack.read(folder)


@pytest.mark.parametrize("name", ["csrc/c.cu", "adapterkern/a.py", "setup.py", "tests/t.py"])
def test_a_pack_is_of_its_sources_and_no_others(tree, packed, name):
    packed.check(tree)
    (tree / name).write_text("changed")
    with pytest.raises(PackError, match="packed from other sources than this tree"):
        packed.check(tree)


def test_what_is_made_in_the_tree_changes_nothing(tree, packed):
    for name in (f"adapterkern/_cuda{SUFFIX}", "adapterkern/_buildinfo.py",
                 "benchmarks/results/a/rows.jsonl", "tests/__pycache__/t.pyc"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("made")
    packed.check(tree)
    (tree / "csrc" / "new.cu").write_text("")
    with pytest.raises(PackError, match="hint: commit, then run"):
        packed.check(tree)


def test_wheels_are_importable_and_the_extension_is_in_its_place(tree, packed, tmp_path):
    said = []
    packed.unpack(tmp_path / "site", tree, SUFFIX, said.append)
    code = "import some; print(some.found)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "7\n"
    assert (tree / "adapterkern" / f"_cuda{SUFFIX}").read_text() == "binary"
    assert (tree / "adapterkern" / "_buildinfo.py").exists()
    assert said == []


def test_an_extension_for_another_python_stays_out_and_is_said(tree, packed, tmp_path):
    said = []
    packed.unpack(tmp_path / "site", tree, ".cpython-399-x.so", said.append)
    assert said == [f"the packed extension is for {SUFFIX}, this Python loads .cpython-399-x.so"]
    assert not (tree / "adapterkern" / "_buildinfo.py").exists()


def test_kernels_are_in_the_cache_of_the_run(tree, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "CACHE", tmp_path / "cache")
    (tmp_path / "HASH").mkdir()
    (tmp_path / "HASH" / "kernel.cubin").write_text("code")
    with tarfile.open(packed.folder / pack.KERNELS, "w:xz") as archive:
        archive.add(tmp_path / "HASH", "HASH")
    packed.unpack(tmp_path / "site", tree, SUFFIX, print)
    assert not (tmp_path / "cache").exists()  # of a pack without kernels
    replace(packed, triton="key").unpack(tmp_path / "site", tree, SUFFIX, print)
    assert (tmp_path / "cache" / "HASH" / "kernel.cubin").read_text() == "code"


def test_no_pack_is_none_and_half_of_one_is_refused(tmp_path):
    assert Pack.read(tmp_path) is None
    (tmp_path / "pack.json").write_text('{"commit": "c"}')
    with pytest.raises(PackError, match="KeyError"):
        Pack.read(tmp_path)


@pytest.fixture
def quick(monkeypatch, tree, tmp_path):
    """Run `create` without a compiler and a network; return what was called."""
    calls = []

    def build(python, archs, target):
        calls.append((*python, archs))
        (target / f"_cuda{SUFFIX}").write_text("binary")

    monkeypatch.setattr(pack, "ROOT", tree)
    monkeypatch.setattr(pack, "commit_of", lambda *_: ("c" * 40, False))
    monkeypatch.setattr(pack, "_build", build)
    monkeypatch.setattr(pack, "_fetch", lambda version, target: calls.append(version))
    return calls


def test_create_writes_what_read_finds(quick, tmp_path):
    said, folder = [], tmp_path / "new"
    (folder / "wheels").mkdir(parents=True)
    (folder / "wheels" / "old.whl").write_text("of an earlier pack")
    made = pack.create([sys.executable], "sm_90a", said.append, folder)
    assert made == Pack.read(folder)
    assert (made.commit, made.suffix) == ("c" * 40, SUFFIX)
    assert quick == [(sys.executable, "sm_90a"), sysconfig.get_python_version()]
    assert not (folder / "wheels" / "old.whl").exists()
    assert said[-1].endswith("MiB, commit cccccccccccc")


def test_create_refuses_what_would_be_no_use(quick, monkeypatch, tmp_path):
    for python in ("/no/such/python", "/usr/bin/true"):
        with pytest.raises(PackError, match="is no Python that runs"):
            pack.create([python], "sm_90a", print, tmp_path / "a")
    monkeypatch.setattr(pack, "MOST_BYTES", 3)
    with pytest.raises(PackError, match="at most 0 fit"):
        pack.create([sys.executable], "sm_90a", print, tmp_path / "b")
    monkeypatch.setattr(pack, "commit_of", lambda *_: None)
    with pytest.raises(PackError, match="has no git commit"):
        pack.create([sys.executable], "sm_90a", print, tmp_path / "c")


@pytest.fixture
def compiler(tmp_path):
    """A Python whose `-m benchmarks.gpu.kernels SHARD SHARDS` writes into Triton's cache, and as
    the second shard does what `second` in the environment says."""
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\n[ "$1" = -m ] || exec '
        f'{sys.executable} "$@"\n'
        'cd "$TRITON_CACHE_DIR" && mkdir "$3of$4" && touch "$3of$4/k.cubin" "$3of$4/k.ttir"\n'
        'if [ "$3" = 1 ]; then eval "$second"; fi\n'
        "echo some-key\n"
    )
    program.chmod(0o755)
    return [str(program)]


def test_kernels_are_compiled_by_all_cores_and_packed_as_they_are_loaded(
    quick, compiler, monkeypatch, tmp_path
):
    monkeypatch.setattr(pack.os, "cpu_count", lambda: 3)
    folder = tmp_path / "new"
    made = pack.create([sys.executable], "sm_90a", print, folder, compiler)
    assert made == Pack.read(folder)
    assert made.triton == "some-key"
    with tarfile.open(folder / pack.KERNELS) as archive:
        assert archive.getnames() == [f"{shard}of3/k.cubin" for shard in range(3)]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("echo 'case: OutOfResources: shared' >&2; exit 1", "case: OutOfResources: shared"),
        ("kill -9 $$", "exit code -9"),
    ],
    ids=["told", "killed"],
)
def test_calls_that_do_not_compile_make_no_pack(
    quick, compiler, monkeypatch, tmp_path, second, says
):
    monkeypatch.setattr(pack.os, "cpu_count", lambda: 3)
    monkeypatch.setenv("second", second)
    with pytest.raises(PackError, match=f"kernels failed:\n{says}"):
        pack.create([sys.executable], "sm_90a", print, tmp_path / "new", compiler)
    assert Pack.read(tmp_path / "new") is None


def test_sources_that_change_meanwhile_make_no_pack(quick, tree, monkeypatch, tmp_path):
    monkeypatch.setattr(pack, "digest", lambda root=tree: str(len(quick)))  # of what was called
    with pytest.raises(PackError, match="changed meanwhile"):
        pack.create([sys.executable], "sm_90a", print, tmp_path / "new")
    assert Pack.read(tmp_path / "new") is None


def test_a_triton_of_another_python_is_refused(quick, monkeypatch, tmp_path):
    facts = {"one": {"version": "3.12", "suffix": SUFFIX}, "two": {"version": "3.11"}}
    monkeypatch.setattr(pack, "_facts", lambda python: facts[python[0]])
    with pytest.raises(PackError, match=r"two is no Python 3\.12, which the extension is for"):
        pack.create(["one"], "sm_90a", print, tmp_path / "new", ["two"])


def test_the_command_prints_what_to_run_there(monkeypatch, capsys, tmp_path):
    made = Pack(tmp_path / ".gpu", "c" * 40, False, "d", SUFFIX)
    monkeypatch.setattr(pack, "create", lambda python, archs, say, triton: made)
    assert main(["pack", "--python", sys.executable]) == 0
    out = capsys.readouterr().out
    assert 'python3 -m benchmarks gpu --stage verify --out "$OUT"' in out


def test_a_missing_interpreter_names_the_option(monkeypatch, capsys):
    monkeypatch.setattr(pack, "_output", lambda command: None)
    assert main(["pack"]) == 2
    assert "name one with --python" in capsys.readouterr().err


def test_the_commit_is_that_of_the_tree_itself(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit, dirty = pack.commit_of(tmp_path)
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    assert pack.commit_of(tmp_path)[1] is False
    assert pack.commit_of(tmp_path / "benchmarks") is None  # a folder of it, not the tree
    (tmp_path / "adapterkern").mkdir()
    (tmp_path / "adapterkern" / "code.py").write_text("")
    assert pack.commit_of(tmp_path)[1] is True
