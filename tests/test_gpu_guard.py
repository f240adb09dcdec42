"""tests/conftest.py: a gpu test that loses the device ends its process and spoils no other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A device that answers until test_breaks_the_device has run.
TESTS = """
import pytest
import torch

broken = False


def synchronize(device=None):
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore words")


torch.cuda.is_available = lambda: True
torch.cuda.synchronize = synchronize


@pytest.mark.gpu
def test_leaves_the_device_alone():
    pass


@pytest.mark.gpu
@pytest.mark.parametrize("fails", [FAILS])
def test_breaks_the_device(fails):
    global broken
    broken = True
    assert not fails


def test_that_comes_after():
    pass
"""


def run_tests(folder: Path, tests: str, **environment: str) -> subprocess.CompletedProcess:
    (folder / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (folder / "test_fake.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    tests_folder = str(Path(__file__).parent)  # conftest.py imports from there
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, (tests_folder, clean.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", folder],
        env=clean | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("fails", [False, True])
def test_a_lost_device_ends_the_run_and_names_the_test(tmp_path, fails):
    done = run_tests(tmp_path, TESTS.replace("FAILS", str(fails)))
    assert done.returncode == 1
    assert "test_leaves_the_device_alone PASSED" in done.stdout
    assert f"test_breaks_the_device[{fails}] {'FAILED' if fails else 'PASSED'}" in done.stdout
    assert (
        "Exit: cuda is lost: CUDA error: an illegal memory access was encountered "
        f"(after test_fake.py::test_breaks_the_device[{fails}])"
    ) in done.stdout
    assert "test_that_comes_after" not in done.stdout


@pytest.mark.thorough
def test_a_lost_device_ends_a_worker_of_xdist_at_once(tmp_path):
    done = run_tests(tmp_path, TESTS.replace("FAILS", "False"), PYTEST_XDIST_WORKER="gw0")
    assert done.returncode == 86
    assert "after test_fake.py::test_breaks_the_device[False])" in done.stderr
    assert "test_that_comes_after" not in done.stdout
    assert " in 0." not in done.stdout  # no summary: pytest did not come to its end


@pytest.mark.thorough
def test_a_device_that_answers_ends_nothing(tmp_path):
    tests = TESTS.replace("FAILS", "False").replace("broken = True", "pass")
    done = run_tests(tmp_path, tests)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
