"""The host-overhead suite runs, each path once and untimed."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


def test_every_path_of_the_suite_runs():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-disable"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "10 passed" in done.stdout
