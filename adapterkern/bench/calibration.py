"""Measures in the same run what this GPU can do: the roofline's numbers, in place of constants."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapterkern.bench import environment
from adapterkern.bench.roofline import Machine
from adapterkern.bench.timing import CudaTimer, Subject, random_bits

COPY_BYTES = 2 * 2**30  # read plus written; far beyond L2
MATRIX_SIZE = 8192
FLOAT32_SIZE = 4096  # an eighth of the work, which CUDA cores do at a tenth of the rate
KERNELS_IN_GRAPH = 512  # so many of the smallest kernel make the graph's own launch negligible
STEADY = 0.03  # clocks that moved further than this between two measurements spoil a run


@dataclass(frozen=True)
class Calibration:
    """Rates and times in SI units; None if not measured, as on a CPU or if not wanted.

    copy_bandwidth: bytes read plus written per second; matrix_rate: FLOP/s in bfloat16;
    matrix_rate_fp32: in float32 as torch computes it here (TF32 or IEEE);
    graph_kernel: seconds of a near-empty kernel in a CUDA graph; eager_launch: host seconds of one
    eager elementwise call; l2_bandwidth: bytes per second read from L2; triton_launch: host seconds
    of one Triton launch; copy_bandwidth_after, matrix_rate_after: the same copy and the same
    product when all else was measured. peak_bandwidth is not measured: bytes per second that the
    memory can transfer, by its clock and width.
    """

    copy_bandwidth: float | None = None
    matrix_rate: float | None = None
    matrix_rate_fp32: float | None = None
    graph_kernel: float | None = None
    eager_launch: float | None = None
    l2_bandwidth: float | None = None
    triton_launch: float | None = None
    copy_bandwidth_after: float | None = None
    matrix_rate_after: float | None = None
    peak_bandwidth: float | None = None

    def machine(self, dtype: str) -> Machine | None:
        """Return the roofline's machine for a case's dtype; None where the copy was not measured.

        Products of a dtype whose rate was not measured bound nothing.
        """
        if self.copy_bandwidth is None:
            return None
        half = self.matrix_rate  # tensor cores run both 16-bit dtypes at one rate
        rates = {"bf16": half, "fp16": half, "fp32": self.matrix_rate_fp32}
        return Machine(self.copy_bandwidth, rates.get(dtype), self.graph_kernel or 0.0)

    @property
    def moves(self) -> dict[str, float]:
        """By what fraction the copy and the product moved during the run, by name, as far as they
        were measured twice.
        """
        pairs = {
            "copy bandwidth": (self.copy_bandwidth, self.copy_bandwidth_after),
            "matrix rate": (self.matrix_rate, self.matrix_rate_after),
        }
        return {
            name: after / before - 1 for name, (before, after) in pairs.items() if before and after
        }

    @property
    def steady(self) -> bool | None:
        """Whether copy and product, memory's clock and the SMs', ran as fast after as before; None
        where neither moved but one of them was not measured twice.
        """
        if any(abs(move) > STEADY for move in self.moves.values()):
            return False
        return True if len(self.moves) == 2 else None

    def as_dict(self) -> dict[str, float]:
        """Return the measured values, for a result's header."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None}


def from_dict(values: dict[str, float]) -> Calibration:
    """Read a result's header; names that this version does not know are left out."""
    known = {field.name for field in dataclasses.fields(Calibration)}
    return Calibration(**{name: value for name, value in values.items() if name in known})


def measure(timer: CudaTimer, seconds: float = 1.0) -> Calibration:
    """Measure copy, matrix rates, near-empty kernel in a graph and launches on this GPU."""
    part = seconds / 4
    return Calibration(
        copy_bandwidth=copy_bandwidth(timer, part),
        matrix_rate=matrix_rate(timer, part),
        matrix_rate_fp32=matrix_rate(timer, part, FLOAT32_SIZE, torch.float32),
        graph_kernel=graph_kernel(timer, part),
        eager_launch=eager_launch(timer),
        peak_bandwidth=environment.peak_bandwidth(torch.device(timer.device)),
    )


def measure_after(timer: CudaTimer, measured: Calibration, seconds: float = 0.3) -> Calibration:
    """Return `measured` with its copy and its product measured again, when a run is over."""
    return dataclasses.replace(
        measured,
        copy_bandwidth_after=copy_bandwidth(timer, seconds / 2),
        matrix_rate_after=matrix_rate(timer, seconds / 2),
    )


def copy_bandwidth(timer: CudaTimer, seconds: float) -> float:
    """Measure the bytes read plus written per second by a device-to-device copy."""
    source = random_bits(COPY_BYTES // 2, timer.device)
    target = torch.empty_like(source)
    return COPY_BYTES / _seconds(timer, "cold", lambda: target.copy_(source), seconds)


def matrix_rate(
    timer: CudaTimer,
    seconds: float,
    size: int = MATRIX_SIZE,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Measure the FLOP/s of a square product; torch's setting decides float32's arithmetic."""
    a = torch.randn(size, size, device=timer.device, dtype=dtype)
    b, c = torch.randn_like(a), torch.empty_like(a)
    return 2 * size**3 / _seconds(timer, "cold", lambda: torch.mm(a, b, out=c), seconds)


def graph_kernel(timer: CudaTimer, seconds: float) -> float:
    """Measure the seconds of a near-empty kernel among others in a CUDA graph."""
    one = torch.zeros(1, device=timer.device)
    return _seconds(timer, "graph", lambda: one.add_(1), seconds, KERNELS_IN_GRAPH)


def eager_launch(timer: CudaTimer) -> float:
    """Measure the host seconds of one eager elementwise call."""
    one = torch.zeros(1, device=timer.device)
    launch = timer.host_us(Subject([lambda: one.add_(1)]))
    assert launch is not None  # a GPU's timer always has one
    return launch * 1e-6


def _seconds(
    timer: CudaTimer, kind: str, call: Callable, seconds: float, least_calls: int = 1
) -> float:
    subject = Subject([call], least_calls=least_calls)
    timings = timer.measure(kind, {"call": subject}, seconds)
    if subject.failure is not None:
        raise subject.failure
    return timings["call"].p50 * 1e-6
