"""The least time that a call can take: bytes over bandwidth, FLOPs over matrix rate, launches.

Units: Ud = T H b, one activation of b-byte elements; Ur = T R b, one bottleneck tensor; R H b, one
weight, with many adapters in a batch that of each of them. An implementation is a list of kernels;
each takes the longest of its bytes at the copy bandwidth, its FLOPs at the matrix rate, and the
time of a near-empty kernel. Every implementation gets full bandwidth and full rate, so ratios are
what fusion alone can buy. Reads that hit L2 count as reads from memory. The parameters of a norm
and its statistics, one number a token each, count as nothing, and so do the buffers of a routing.
"""

from dataclasses import astuple, dataclass, replace

from adapterkern.bench.cases import BenchCase


@dataclass(frozen=True)
class Machine:
    """The bounds of a kernel, as `calibration` measures them.

    Args:
        copy_bandwidth: bytes read plus written per second by a device-to-device copy.
        matrix_rate: FLOP/s of a dense matrix product in the case's dtype; None: not known, so that
            products bound nothing.
        launch_seconds: wall time of a near-empty kernel inside a CUDA graph; 0: not known.
    """

    copy_bandwidth: float
    matrix_rate: float | None = None
    launch_seconds: float = 0.0

    def product_seconds(self, flops: float) -> float:
        """Return the least time of that many FLOPs, 0 where the rate is not known."""
        return 0.0 if self.matrix_rate is None else flops / self.matrix_rate


@dataclass(frozen=True)
class Kernel:
    """Traffic of one kernel: `ud` activations, `ur` bottleneck tensors, `weights` times R H b bytes
    (one weight is 1), and `products` matrix products of 2 T H R FLOPs each.
    """

    ud: float
    ur: float = 0.0
    weights: float = 0.0
    products: float = 0.0

    def bytes(self, case: BenchCase) -> float:
        """Bytes to and from memory."""
        row = self.ud * case.hidden_size + self.ur * case.bottleneck_size
        weight = self.weights * case.hidden_size * case.bottleneck_size * case.used_adapters
        return (case.tokens * row + weight) * case.element_size

    def flops(self, case: BenchCase) -> float:
        """FLOPs of the matrix products."""
        tokens = case.tokens if case.used_adapters else 0
        return 2.0 * self.products * tokens * case.hidden_size * case.bottleneck_size

    def seconds(self, case: BenchCase, machine: Machine) -> float:
        """Return the longest of the three bounds."""
        memory = self.bytes(case) / machine.copy_bandwidth
        return max(memory, machine.product_seconds(self.flops(case)), machine.launch_seconds)


# One weight gradient is written once, in the parameters' dtype.
_FORWARD = {  # a call that saves nothing
    "floor": [Kernel(2, 0, 2, 2)],
    "adapterhub": [Kernel(1, 1, 1, 1), Kernel(0, 2), Kernel(1, 1, 1, 1), Kernel(2), Kernel(3)],
    "plain": [Kernel(1, 1, 1, 1), Kernel(0, 2), Kernel(1, 1, 1, 1), Kernel(3)],
    # A product that adds to a matrix copies that matrix first.
    "addmm": [Kernel(1, 1, 1, 1), Kernel(2), Kernel(2, 1, 1, 1)],
    "cublaslt": [Kernel(1, 1, 1, 1), Kernel(2, 1, 1, 1)],
    "compile": [Kernel(1, 1, 1, 1), Kernel(0, 2), Kernel(1, 1, 1, 1), Kernel(3)],
    "limit": [Kernel(2)],  # y = x
}
_RECORDING = {  # what applies the activation in the first product also writes z
    **_FORWARD,
    "floor": [Kernel(2, 1, 2, 2)],
    "addmm": [Kernel(1, 2, 1, 1), Kernel(2), Kernel(2, 1, 1, 1)],
    "cublaslt": [Kernel(1, 2, 1, 1), Kernel(2, 1, 1, 1)],
}
_BACKWARD = {
    "floor": [Kernel(3, 1, 4, 4)],
    "adapterhub": [
        *(Kernel(2), Kernel(1, 1, 1, 1), Kernel(1, 1, 1, 1), Kernel(1), Kernel(0, 3)),
        *(Kernel(1, 1, 1, 1), Kernel(1, 1, 1, 1), Kernel(0, 1), Kernel(3)),
    ],
    "plain": [
        *(Kernel(1, 1, 1, 1), Kernel(1, 1, 1, 1), Kernel(1), Kernel(0, 3)),
        *(Kernel(1, 1, 1, 1), Kernel(1, 1, 1, 1), Kernel(0, 1), Kernel(3)),
    ],
    "addmm": [
        *(Kernel(1, 1, 1, 1), Kernel(0, 3), Kernel(1, 1, 1, 1), Kernel(1), Kernel(1, 1, 1, 1)),
        *(Kernel(2), Kernel(2, 1, 1, 1)),
    ],
    "cublaslt": [
        *(Kernel(1, 2, 1, 1), Kernel(1, 1, 1, 1), Kernel(1, 1, 1, 1), Kernel(2, 1, 1, 1)),
    ],
    "compile": [
        *(Kernel(2), Kernel(1, 1, 1, 1), Kernel(1, 1, 1, 1), Kernel(0, 3)),
        *(Kernel(1, 1, 1, 1), Kernel(1, 1, 1, 1), Kernel(3)),
    ],
    "limit": [Kernel(3)],  # dx = dy + x
}
# With a norm: one pass that reads x and skip and writes y, and the stream where a backward reads
# it; that reads dy, stream and x, and writes dx and the gradient of skip. "separate" is the plain
# floor with the skip in it, then torch's norm; "add-norm" is a block without an adapter whose add
# and norm are one pass.
_NORM_FORWARD = {
    "floor": [Kernel(3, 0, 2, 2)],
    "separate": [Kernel(3, 0, 2, 2), Kernel(2)],
    "add-norm": [Kernel(3)],
    "no-adapter": [Kernel(3), Kernel(2)],
    "limit": [Kernel(3)],  # y = x + skip
}
_NORM_RECORDING = {
    **_NORM_FORWARD,
    "floor": [Kernel(4, 1, 2, 2)],
    "separate": [Kernel(3, 1, 2, 2), Kernel(2)],
    "add-norm": [Kernel(4)],
    "limit": [Kernel(2), Kernel(2)],  # two copies
}
# Torch reads dy and the stream once more for the gradients of the norm's parameters.
_NORM_BACKWARD = {
    "floor": [Kernel(5, 1, 4, 4)],
    "separate": [Kernel(3), Kernel(2), Kernel(3, 1, 4, 4)],
    "add-norm": [Kernel(3)],
    "no-adapter": [Kernel(3), Kernel(2)],
    "limit": [Kernel(3), Kernel(2)],  # dx = dy + x, and a copy
}
# What follows the others: an add of the skip and a norm, forward as backward.
_THEN_NORM = [Kernel(3), Kernel(2)]
MODELS = tuple(_FORWARD)


def _loop(case: BenchCase) -> list[Kernel]:
    """Return the kernels of a loop over the adapters of a batch: x in the order of the adapters, a
    floor's for each, the results joined, and again in the order of the tokens. The backward of
    either order adds to zeros.
    """
    share = 1 / case.adapters

    def each(kernels: list[Kernel]) -> list[Kernel]:
        (one,) = kernels
        return [Kernel(*(share * part for part in astuple(one)))] * case.adapters

    undone = [Kernel(1), Kernel(3)]
    backward = [*undone, *each(_BACKWARD["floor"]), Kernel(2), *undone]
    if case.mode == "backward":
        return backward
    of = _FORWARD if case.mode == "forward" else _RECORDING
    forward = [Kernel(2), *each(of["floor"]), Kernel(2), Kernel(2)]
    return forward if case.mode == "forward" else forward + backward


def _seen(case: BenchCase, implementation: str) -> tuple[BenchCase, str]:
    """Return the case as the implementation sees it: a single adapter for all tokens has no more
    weights than that."""
    if implementation != "single":
        return case, implementation
    return replace(case, adapters=0, mix="even"), "floor"


def kernels(case: BenchCase, implementation: str = "floor") -> list[Kernel]:
    """Return the kernels of one call in the case's mode.

    Raises:
        KeyError: the implementation is none of MODELS, nor known for a case with a norm.
    """
    if implementation == "loop":
        return _loop(case)
    if case.norm == "none":
        forward, recording, backward = _FORWARD, _RECORDING, _BACKWARD
    elif implementation in _NORM_FORWARD:
        forward, recording, backward = _NORM_FORWARD, _NORM_RECORDING, _NORM_BACKWARD
    else:
        plain = kernels(replace(case, norm="none"), implementation)
        return plain + _THEN_NORM * (2 if case.mode == "step" else 1)
    if case.mode == "forward":
        return forward[implementation]
    if case.mode == "backward":
        return backward[implementation]
    return recording[implementation] + backward[implementation]


def moved_bytes(case: BenchCase, implementation: str = "floor") -> float:
    """Return the bytes to and from memory of one call."""
    case, implementation = _seen(case, implementation)
    return sum(kernel.bytes(case) for kernel in kernels(case, implementation))


def seconds(case: BenchCase, machine: Machine, implementation: str = "floor") -> float:
    """Return the least time of one call."""
    case, implementation = _seen(case, implementation)
    return sum(kernel.seconds(case, machine) for kernel in kernels(case, implementation))


def bound(case: BenchCase, machine: Machine) -> str:
    """Return what bounds the floor: launch, compute, weights or memory."""
    least = kernels(case)
    memory = moved_bytes(case) / machine.copy_bandwidth
    compute = machine.product_seconds(sum(kernel.flops(case) for kernel in least))
    if max(memory, compute) < len(least) * machine.launch_seconds:
        return "launch"
    if compute > memory:
        return "compute"
    return "weights" if case.tokens < case.bottleneck_size * case.used_adapters else "memory"
