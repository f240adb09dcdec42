"""Memory of its own for each call of a CUDA graph: activations, and the weights as well.

A graph that ran one call over and over would find its input and its weights in L2. A model does
not: between two uses of a layer's weights all its other layers pass. So the calls take turns over
so many sets of tensors that L2 has forgotten one when its turn comes again.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adapterkern.bench.cases import BenchCase, Inputs, parameter
from adapterkern.bench.timing import CALLS_IN_GRAPH, CudaTimer, WallTimer

DISTINCT_L2S = 3  # L2 caches that all sets together fill
MOST_SETS = 512  # beyond, a step is a graph of some ten thousand kernels
# A graph's calls move at least so many bytes, or are as many as make it long enough in any case:
# either takes a quarter of a millisecond, the kernels of a small call 2 us. The launch of the
# graph, one or two microseconds within the events, is below one per cent of that.
GRAPH_BYTES = 2**30
ENOUGH_CALLS = 128


class FixedWeightsError(RuntimeError):
    """A provider that does not compute with the weights its leaves are given."""


def activation_bytes(case: BenchCase) -> int:
    """Count the bytes of one call's x and y, or dy and dx: the least that is distinct in a set; and
    of the skip that a norm comes behind."""
    passes = 3 if case.kind == "norm" else 2
    return passes * case.tokens * case.hidden_size * case.element_size


def weight_bytes(case: BenchCase) -> int:
    """Return the bytes of both weights and both biases of every adapter that is used; a norm's are
    no more than a bias."""
    weights = 2 * case.hidden_size * case.bottleneck_size
    one = (weights + case.hidden_size + case.bottleneck_size) * case.element_size
    return case.used_adapters * one


def set_count(case: BenchCase, timer: WallTimer | CudaTimer) -> int:
    """Return how many sets a graph's calls take in turn; on a CPU, which has no graphs, one."""
    if isinstance(timer, WallTimer):
        return 1
    each = activation_bytes(case) + weight_bytes(case)
    return max(1, min(MOST_SETS, -(-DISTINCT_L2S * timer.l2_bytes // each)))


def least_calls(case: BenchCase) -> int:
    """Return how many calls a graph holds at least."""
    each = activation_bytes(case) + weight_bytes(case)
    return max(CALLS_IN_GRAPH, min(ENOUGH_CALLS, -(-GRAPH_BYTES // each)))


def sets(case: BenchCase, inputs: Inputs, timer: WallTimer | CudaTimer) -> list[Inputs]:
    """Return the case's inputs and copies, fewer where memory runs out; rows say how large."""
    found = [inputs]
    with contextlib.suppress(torch.OutOfMemoryError):
        for _ in range(1, set_count(case, timer)):
            dy = inputs.dy if case.mode == "forward" else inputs.dy.clone()
            parameters = inputs.parameters
            if case.used_adapters:
                parameters = {name: tensor.clone() for name, tensor in parameters.items()}
            found.append(Inputs(inputs.x.clone(), dy, parameters))
    return found


@contextlib.contextmanager
def exchanged(leaves: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let each leaf hold the values, and have the memory, of its namesake within the block.

    The leaves stay the same objects, so modules, saved tensors and compiled code find the new
    memory through them. A forward and its backward need the same values: autograd keeps the leaves
    themselves, but views of them as they were.

    Raises:
        FixedWeightsError: a leaf has another shape or dtype than its namesake, or has none.
    """
    given = {}
    for name, leaf in leaves.items():
        value = parameter(values, name)
        if value is None or (leaf.shape, leaf.dtype) != (value.shape, value.dtype):
            wanted = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise FixedWeightsError(
                f"its {name} is {leaf.dtype} {list(leaf.shape)}, the case has {wanted}"
            )
        given[name] = value
    held = {name: leaf.data for name, leaf in leaves.items()}
    try:
        for name, leaf in leaves.items():
            leaf.data = given[name]
        yield
    finally:
        for name, leaf in leaves.items():
            leaf.data = held[name]


def with_weights(
    call: Callable[[], Any], leaves: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Callable[[], Any]:
    """Wrap `call` in a block of `exchanged`, which costs the host some microseconds."""

    def exchanged_call() -> Any:
        with exchanged(leaves, values):
            return call()

    return exchanged_call


def halved(inputs: Inputs) -> Inputs:
    """Return the inputs with every parameter halved, exact in every dtype, to see who uses it."""
    parameters = {name: tensor * 0.5 for name, tensor in inputs.parameters.items()}
    return replace(inputs, parameters=parameters)
