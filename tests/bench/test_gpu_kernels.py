"""The kernels of a pack are those that a run on a GPU asks Triton for."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapterkern.cli.check import worker
from benchmarks.gpu import kernels, machine, pack

pytest.importorskip("triton")


def test_the_checks_are_those_of_the_command():
    chosen = argparse.Namespace(dtype=None, level="default", case=None)
    cases = worker.cases_of("triton", torch.device("cuda"), chosen)
    assert [name for name, _ in kernels.checks()] == list(map(str, cases))


@pytest.mark.thorough
def test_another_process_finds_every_kernel_that_was_packed(tmp_path):
    """Of a check and of the last measurement, and in another folder than where they were made."""

    def compile_some(cache: Path) -> set[str]:
        last = sum(1 for _ in (*kernels.checks(), *kernels.measurements())) - 1
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.kernels", "3", str(last - 3)],
            cwd=pack.ROOT, capture_output=True, text=True,
            env={**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == machine.triton_key()
        return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}

    made = compile_some(tmp_path / "made")
    packed = {name for name in made if name.endswith(pack._LOADED)}
    assert sum(name.endswith(".cubin") for name in packed) >= 6
    pack.archive(tmp_path / "made", tmp_path / "archive")
    shutil.rmtree(tmp_path / "made")
    pack.restore(tmp_path / "archive", tmp_path / "there")
    assert compile_some(tmp_path / "there") == packed


def test_a_call_that_cannot_be_compiled_is_named(monkeypatch, capsys):
    def refuse() -> None:
        raise ValueError("no such tile")

    done = []
    monkeypatch.setattr(kernels, "checks", lambda: [("a", refuse), ("b", lambda: done.append("b"))])
    monkeypatch.setattr(kernels, "measurements", lambda: [("c", lambda: done.append("c"))])
    monkeypatch.setattr(sys, "argv", ["kernels", "0", "1"])
    assert kernels.main() == 1
    assert capsys.readouterr().err == "a: ValueError: no such tile\n"
    assert done == ["b", "c"]
