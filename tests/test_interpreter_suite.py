"""Runs tests/interpreter, where the Triton kernels execute on the CPU, in its own processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "interpreter"


@pytest.mark.interpreter
def test_interpreter_suite_passes(capsys):
    """The files of the suite side by side, one process each: TRITON_INTERPRET=1 must be set before
    kernels are defined, and an access out of bounds would take the process down."""
    pytest.importorskip("triton")
    outer = ("PYTEST_", "TRITON_")  # what this run was started with does not reach the inner one
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    runs = {
        path.name: subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for path in sorted(SUITE.glob("test_*.py"))
    }
    try:
        outputs = {name: run.communicate()[0] for name, run in runs.items()}
    finally:
        for run in runs.values():
            run.kill()  # where this test was interrupted
    failures = [name for name, run in runs.items() if run.returncode != 0]
    with capsys.disabled():
        for name, output in outputs.items():
            print(f"\n  {name}: {output.strip().splitlines()[-1]}")
    assert len(runs) >= 2
    assert not failures, "\n\n".join(outputs[name] for name in failures)
    passed = {name: int(re.search(r"(\d+) passed", output)[1]) for name, output in outputs.items()}
    # Few, but each counts the bytes of whole passes, or runs a call in every dtype that it takes.
    least = {
        "test_triton_traffic.py": 5,
        "test_triton_norm_traffic.py": 6,
        "test_triton_norm.py": 50,
        "test_triton_grouped_backward.py": 43,
        "test_triton_grouped_rows.py": 20,
    }
    assert all(count >= least.get(name, 51) for name, count in passed.items()), passed
