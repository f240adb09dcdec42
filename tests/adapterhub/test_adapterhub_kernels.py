"""The oracle again, with Triton's kernels in place of the reference, which its interpreter runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)
pytest.importorskip("triton", reason="needs Triton's interpreter")

ROOT = Path(__file__).parents[2]
# Each preset in a post-LN and a pre-LN model, compositions that slice, stack and repeat, and some
# whose children run as one.
CASES = (
    "cpu and (float32 or autocast) and "
    "(agree and not one_launch and (bert- or gpt2-) and not roberta and not distilbert "
    "and not hooks and (seq_bn or par_bn or adapter_plus or split or stack_parallel or stack_fuse)"
    " or wrong_maths and gpt2 and layer"
    " or one_launch and (bert-float32-parallel_learned or bert-autocast-parallel_of_four"
    " or gpt2-float32-stack_parallel_with_a_gap))"
)


@pytest.mark.thorough
def test_oracle_agrees_where_kernels_run():
    """TRITON_INTERPRET=1 must be set before Triton is imported."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", CASES, "tests/adapterhub"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1500,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    summary = ran.stdout.splitlines()[-1] if ran.stdout else ran.stderr
    assert ran.returncode == 0, "\n".join(re.findall("^(?:E|FAILED).*", ran.stdout, re.MULTILINE))
    assert int(re.search(r"(\d+) passed", summary)[1]) >= 40
