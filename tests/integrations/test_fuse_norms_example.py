import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.thorough
def test_the_example_shows_equal_results_of_both_models():
    ran = subprocess.run(
        [sys.executable, "examples/fused_norms.py"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout
    assert lines.count("4 of 4 adapted layers run in one pass with what follows them") == 2
    for kind in ("LayerNorm", "LlamaRMSNorm"):
        assert re.search(rf"add, {kind} +fused", lines)
    apart = [float(number) for number in re.findall(r"at most (\S+) from the unfused", lines)]
    assert len(apart) == 4
    assert max(apart) <= 1e-5
    losses = re.findall(r"loss (\S+) to (\S+),", lines)
    assert all(float(last) < float(first) for first, last in losses)
    assert lines.count("without adapters equal: True") == 2
