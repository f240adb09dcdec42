"""Measures what the package's calibration leaves out, as it takes Triton: L2 reads and a launch."""

import dataclasses
from typing import Any

import torch

from adapterkern.bench import calibration
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.results import LostDeviceError
from adapterkern.bench.timing import CudaTimer, Subject, random_bits

L2_BYTES = 16 * 2**20  # well inside the L2 of every GPU that runs the kernels, beyond its L1s
L2_PASSES = 32
_BLOCK = 4096  # elements a load


def measure(timer: CudaTimer, seconds: float) -> Calibration:
    """Measure this GPU's whole calibration; the two Triton numbers are None where Triton fails."""
    base = calibration.measure(timer, seconds)
    try:
        more = {"l2_bandwidth": l2_bandwidth(timer, seconds / 4), "triton_launch": _launch(timer)}
    except LostDeviceError:
        raise
    except Exception:  # whatever stops Triton here shows in the rows; the rest stands without
        return base
    return dataclasses.replace(base, **more)


def l2_bandwidth(timer: CudaTimer, seconds: float) -> float:
    """Measure the bytes per second that all SMs together read from L2, past their L1 caches."""
    read_kernel, _ = _kernels()
    elements = L2_BYTES // 4
    source = random_bits(L2_BYTES, timer.device).view(torch.float32)
    programs = 4 * torch.cuda.get_device_properties(timer.device).multi_processor_count
    sums = torch.empty(programs, dtype=torch.float32, device=timer.device)
    blocks = elements // _BLOCK

    def read() -> None:
        read_kernel[(programs,)](source, sums, blocks, L2_PASSES, _BLOCK, num_warps=8)

    subject = Subject([read])  # in a graph each call but the first finds it in L2
    timing = timer.measure("graph", {"read": subject}, seconds)
    if subject.failure is not None:
        raise subject.failure
    per_program = -(-blocks // programs)
    return programs * per_program * L2_PASSES * _BLOCK * 4 / (timing["read"].p50 * 1e-6)


def _launch(timer: CudaTimer) -> float:
    """Measure the host seconds of one Triton launch with ten arguments, about an adapter's."""
    _, empty_kernel = _kernels()
    one = torch.zeros(1, device=timer.device)
    launch = timer.host_us(Subject([lambda: empty_kernel[(1,)](*[one] * 7, 1, 2, 3)]))
    assert launch is not None  # a GPU's timer always has one
    return launch * 1e-6


def _kernels() -> tuple[Any, Any]:
    from benchmarks import triton_rate_kernels

    return triton_rate_kernels.read_kernel, triton_rate_kernels.empty_kernel
