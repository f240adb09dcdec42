"""The example runs as a user runs it, and what it prints is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)
pytest.importorskip("accelerate", reason="AdapterTrainer needs accelerate")

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
def test_the_example_trains_saves_loads_and_prints_the_same_losses():
    ran = subprocess.run(
        [sys.executable, "examples/adapterhub.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout
    assert "2 of 2 adapter layers run in adapterkern (patched)" in printed
    before, after = re.search(r"training loss: ([\d.]+) before, ([\d.]+) after", printed).groups()
    assert 0.1 < float(before) < 0.69  # random guesses cost log(2)
    assert float(after) == pytest.approx(float(before), abs=1e-5)
    assert float(re.search(r"difference of the logits: (\S+)", printed)[1]) < 1e-4
    assert re.search(r"64 texts on cpu: [\d.]+ ms before, [\d.]+ ms after", printed)
    assert "no claim about speed" in printed
