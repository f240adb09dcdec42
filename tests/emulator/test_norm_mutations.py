"""As test_mutations.py, for the norm: each planted fault turns a small set of cases red."""

import cuda_emulator
import pytest
from cuda_norms import CLUSTERS, NormCase, missed, plan
from emulated import emulated, with_fault

from adapterkern.backends.cuda import norm as cuda_norm

pytestmark = pytest.mark.thorough

# fault: file, text, replacement
FAULTS = {
    "moments of the warps merged before they are there": (
        "norm.cuh",
        "  __syncthreads();  // the moments of every warp are there\n",
        "",
    ),
    "normalised before the moments of every block are there": (
        "norm.cuh",
        "  cluster_barrier();  // the moments of every block are there\n",
        "  __syncthreads();\n",
    ),
    "features that do not exist counted": (
        "cluster.cuh",
        "        if (exists) moments.add(",
        "        moments.add(",
    ),
    "sums of the row read before they are there": (
        "norm_gradients.cu",
        "  __syncthreads();  // the sums of every warp are there\n",
        "",
    ),
    "sums of the next row in the place of these": (
        "norm_gradients.cu",
        "odd = !odd)",
        "odd = false)",
    ),
    "column sums added before they are there": (
        "norm_gradients.cu",
        "  __syncthreads();  // the sums of every row are there\n",
        "",
    ),
    "column sums overwritten while they are read": (
        "norm_gradients.cu",
        "  __syncthreads();  // before the next sums take the place of these\n",
        "",
    ),
    "parts added before they are there": (
        "norm_gradients.cu",
        "  __syncthreads();  // every part is there\n",
        "",
    ),
}
# Clusters of three tiles of 64 tokens, and of 16 with 8 warps that share rows.
CASES = [
    (2, 64, NormCase(tokens=150, mean=5.0)),
    (4, 16, NormCase(tokens=37, hidden=520, mean=5.0)),
]


def is_red(kernels: cuda_emulator.Emulator) -> bool:
    for size, tokens, case in CASES:
        for kernels.seed in (0, 1, 2, 3, 5, 7):  # some races take a certain order of the warps
            with emulated(kernels, CLUSTERS), pytest.MonkeyPatch.context() as patch:
                fixed = plan(size, tokens, case.hidden)
                patch.setattr(cuda_norm, "norm_plan", lambda *_, fixed=fixed: fixed)
                try:
                    if missed(case):
                        return True
                except RuntimeError:  # the emulator saw it itself
                    return True
    return False


def test_norm_cases_are_green_without_a_fault(tmp_path):
    assert not is_red(with_fault(tmp_path, None))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_the_norm_turns_its_cases_red(tmp_path, fault):
    assert is_red(with_fault(tmp_path, FAULTS[fault]))
