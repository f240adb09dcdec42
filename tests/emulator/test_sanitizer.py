"""Under AddressSanitizer, kernels access only their inputs, outputs and work spaces."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_emulator
import pytest

pytestmark = pytest.mark.thorough


def run_sanitized(
    folder: Path, changes: dict, source: str = "library.cpp"
) -> subprocess.CompletedProcess:
    if cuda_emulator.missing() is not None:
        pytest.skip(cuda_emulator.missing())
    asked = [cuda_emulator.COMPILER, "-print-file-name=libasan.so"]
    runtime = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if shutil.which(runtime) is None and not Path(runtime).is_absolute():
        pytest.skip("needs libasan")
    changes = {**cuda_emulator.narrowed("__nv_bfloat16", "float"), **changes}
    flags = cuda_emulator.SANITIZER_FLAGS
    library = cuda_emulator.build(folder, source, flags=flags, changes=changes)
    environ = {
        **os.environ,
        "LD_PRELOAD": runtime,
        # The interpreter's own leaks, and the emulator's stacks, are not the kernels' errors.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(cuda_emulator.SOURCES.parent), *sys.path]),
    }
    command = [sys.executable, str(cuda_emulator.HERE / "sanitized.py"), str(library)]
    return subprocess.run(command, env=environ, capture_output=True, text=True)


@pytest.mark.parametrize("source", ["library.cpp", "grouped.cpp"])
def test_kernels_stay_within_their_tensors(tmp_path, source):
    done = run_sanitized(tmp_path, {}, source)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "mask", "off_by_one"),
    [
        ("memory.cuh", "row >= rows", "row > rows"),
        ("tiles.cuh", "row < rows ? bytes : 0", "row <= rows ? bytes : 0"),
        ("tiles.cuh", "else if (row < matrix.rows", "else if (row <= matrix.rows"),
        ("resident_tiles.cuh", "row < rows ? bytes : 0", "row <= rows ? bytes : 0"),
        ("gradient_tiles.cuh", "kRowsApart < rows_left ?", "kRowsApart <= rows_left ?"),
        ("row_block.cuh", "!exists || token >= num_tokens", "!exists || token > num_tokens"),
        (
            "cluster.cuh",
            "if (!exists || token >= num_tokens) return;\n          load_raw",
            "if (!exists || token > num_tokens) return;\n          load_raw",
        ),
        (
            "norm.cuh",
            "if (token >= params.num_tokens) continue;\n      const auto words",
            "if (token > params.num_tokens) continue;\n      const auto words",
        ),
    ],
    ids=[
        "elements",
        "copied tiles",
        "converted tiles",
        "tiles of warpgroups",
        "gradient tiles",
        "y in vectors",
        "what a cluster adds",
        "normed",
    ],
)
def test_mask_off_by_one_is_reported(tmp_path, file, mask, off_by_one):
    done = run_sanitized(tmp_path, {file: [(mask, off_by_one)]})
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_row_of_a_tile_beyond_the_tokens_is_reported(tmp_path):
    change = ("row < 0 || row > rows ? rows", "row > rows ? rows")
    done = run_sanitized(tmp_path, {"memory.cuh": [change]}, "grouped.cpp")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
