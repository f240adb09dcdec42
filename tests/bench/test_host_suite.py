"""The suites of host time run, each path once and untimed."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("file", "needs", "passed"),
    [("test_host_overhead.py", "triton", 16), ("test_adapterhub_host_time.py", "adapters", 160)],
)
def test_every_path_of_the_suites_runs(file, needs, passed):
    pytest.importorskip(needs)
    command = [sys.executable, "-m", "pytest", f"benchmarks/{file}", "-q", "--benchmark-disable"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert f"{passed} passed" in done.stdout
