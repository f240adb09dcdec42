"""Runs tests/interpreter, where the Triton kernels execute on the CPU, in its own processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "interpreter"
# The least number of tests a file that its run passes, so that a skip or a mark cannot empty it.
LEAST = {
    "not thorough": {
        "test_triton_forms.py": 55,
        "test_triton_grouped.py": 56,
        "test_triton_grouped_backward.py": 37,
        "test_triton_grouped_rows.py": 14,
        "test_triton_norm.py": 12,
        "test_triton_options.py": 31,
        "test_triton_traffic.py": 5,
    },
    "thorough": {
        "test_triton_forms.py": 105,
        "test_triton_grouped.py": 17,
        "test_triton_grouped_backward.py": 6,
        "test_triton_grouped_rows.py": 6,
        "test_triton_norm.py": 34,
        "test_triton_norm_traffic.py": 6,
        "test_triton_options.py": 105,
    },
}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "tier", ["not thorough", pytest.param("thorough", marks=pytest.mark.thorough)]
)
def test_interpreter_suite_passes(capsys, tier):
    """The files of the suite side by side, one process each: TRITON_INTERPRET=1 must be set before
    kernels are defined, and an access out of bounds would take the process down."""
    pytest.importorskip("triton")
    runs = {name: start(SUITE / name, tier) for name in LEAST[tier]}
    try:
        outputs = {name: run.communicate()[0] for name, run in runs.items()}
    finally:
        for run in runs.values():
            run.kill()  # where this test was interrupted
    failures = [name for name, run in runs.items() if run.returncode != 0]
    with capsys.disabled():
        for name, output in outputs.items():
            print(f"\n  {name}: {output.strip().splitlines()[-1]}")
    assert not failures, "\n\n".join(outputs[name] for name in failures)
    passed = {name: int(re.search(r"(\d+) passed", output)[1]) for name, output in outputs.items()}
    assert all(passed[name] >= least for name, least in LEAST[tier].items()), passed


def test_every_file_of_the_suite_is_run():
    run = {name for tier in LEAST.values() for name in tier}
    assert run == {path.name for path in SUITE.glob("test_*.py")}


def start(path: Path, tier: str) -> subprocess.Popen:
    outer = ("PYTEST_", "TRITON_")  # what this run was started with does not reach the inner one
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-m", tier, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
