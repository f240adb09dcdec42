"""Runs every form on a small problem, for test_sanitizer.py; exits with 1 if a result is wrong.

Usage: python sanitized.py LIBRARY
"""

import ctypes
import sys
from dataclasses import replace
from pathlib import Path

import cuda_facts
import torch
from cuda_emulator import Emulator
from cuda_forms import RESIDENT
from cuda_grouped import GroupedCase, GroupedEmulator, backend
from cuda_grouped import missed as wrong_groups
from cuda_norms import CLUSTERS, NormCase
from cuda_norms import missed as wrong_norms
from emulated import emulated

from adapterkern.backends.cuda import launch_config
from adapterkern.backends.cuda.facts import Device
from adapterkern.parity import Case, check_case

# Rows of x and the weights end at odd addresses, but for some of whole vectors; tiles are partly
# filled, T is ragged.
SIZES = (
    (Device(1), 70, 75, 20),
    (Device(64), 37, 72, 20),
    (Device(64), 5, 530, 20),
    (Device(8), 530, 33, 25),
    (Device(1, 227 * 1024), 150, 300, 20),
    (Device(14, 227 * 1024), 37, 530, 20),
    (Device(14, 227 * 1024), 37, 528, 24),
    (replace(RESIDENT, num_sms=2), 70, 136, 24),
    (replace(RESIDENT, cluster_sizes=(8,)), 70, 520, 24),
)
NORMS = (
    NormCase(tokens=70, parameters=torch.float32),
    NormCase(tokens=5, hidden=528, norm="rms", gaps=True, residual="tensor"),
)
OPTIONS = ({"scaling": "channel", "skip": True}, {"layout": "rows", "bias": "none"})


# Units and slots that no adapter has are NaN; the weights of the last slot end where its rank does.
GROUPS = (
    (Device(1), GroupedCase(tokens=70, hidden=75, bottleneck=20, ranks=(20, 0, 20))),
    (Device(1), GroupedCase(tokens=70, hidden=72, bottleneck=24, ranks=None, gaps=True)),
    (Device(64), GroupedCase(tokens=37, hidden=72, bottleneck=24, ranks=None)),
    (Device(64), GroupedCase(tokens=5, hidden=530, bottleneck=20, ranks=(20, 0, 20))),
)


def main() -> int:
    torch.set_num_threads(1)
    launch_config.facts = cuda_facts.of_the_sources
    library = Path(sys.argv[1])
    if not hasattr(ctypes.CDLL(str(library)), "emulated_forward"):
        return run_groups(GroupedEmulator(library))
    kernels = Emulator(library)
    missed = []
    for index, (device, tokens, hidden, bottleneck) in enumerate(SIZES):
        for dtype in (torch.bfloat16, torch.float32):
            for option in OPTIONS:
                case = Case(
                    dtype, shape=(tokens,), hidden_size=hidden, bottleneck_size=bottleneck, **option
                )
                kernels.seed = index % 3
                with emulated(kernels, device):
                    missed += [row for row in check_case(case, "cuda") if not row.passed]
    for index, case in enumerate(NORMS):
        kernels.seed = index % 3
        with emulated(kernels, CLUSTERS):
            missed += wrong_norms(case)
    print(*missed, sep="\n")
    return bool(missed)


def run_groups(kernels: GroupedEmulator) -> int:
    missed = []
    for index, (device, case) in enumerate(GROUPS):
        kernels.seed = index % 3
        for dtype in (torch.bfloat16, torch.float32):
            missed += wrong_groups(replace(case, dtype=dtype).draw(), backend(kernels, device))
    print(*missed, sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
