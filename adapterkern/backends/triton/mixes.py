"""Every mix of dtypes and options that one launch configuration can meet.

A configuration is found for a `Problem`, which says little about dtypes: on a large GPU the one of
a bfloat16 call serves float32 master weights and float32 residuals too, whose tiles take twice the
shared memory. `mixes` lists what shares a problem, `launches` compiles an entry for one of them.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkern.backends.base import Needs, empty_outputs
from adapterkern.backends.triton import backend, tuned
from adapterkern.backends.triton.launch_config import Device, Problem
from adapterkern.backends.triton.tuned import Entry
from adapterkern.spec import AdapterCall, make_call
from adapterkern.validation import name_of


class Mix(NamedTuple):
    """The dtypes in a call. added: those of an external residual and skip, None if x alone is
    added; scaling: that of a vector over H, None for the float 1.0; odd: no tile divides the sizes.
    """

    x: torch.dtype
    weights: torch.dtype
    products: torch.dtype
    added: torch.dtype | None = None
    scaling: torch.dtype | None = None
    bias: bool = True
    odd: bool = False
    activation: str = "gelu"

    def __str__(self) -> str:
        named = zip(self._fields, self, strict=True)
        return ", ".join(
            f"{name} {name_of(value) if isinstance(value, torch.dtype) else value}"
            for name, value in named
        )

    def call(self, tokens: int, hidden: int, bottleneck: int, device: str = "cpu") -> AdapterCall:
        """Return a call of this mix whose tensors are uninitialised."""

        def empty(dtype: torch.dtype | None, *shape: int) -> Tensor | None:
            return None if dtype is None else torch.empty(shape, dtype=dtype, device=device)

        biases, scaling = self.weights if self.bias else None, empty(self.scaling, hidden)
        call = make_call(
            empty(self.x, tokens, hidden),  # type: ignore[arg-type]
            empty(self.weights, bottleneck, hidden),  # type: ignore[arg-type]
            empty(self.weights, hidden, bottleneck),  # type: ignore[arg-type]
            empty(biases, bottleneck),
            empty(biases, hidden),
            "input" if self.added is None else empty(self.added, tokens, hidden),
            empty(self.added, tokens, hidden),
            activation=self.activation,
            scaling=1.0 if scaling is None else scaling,
        )
        return call._replace(compute_dtype=self.products)


def uniform(dtype: torch.dtype, activation: str = "gelu") -> Mix:
    """Return the mix that is timed: everything has one dtype, and there are biases."""
    return Mix(dtype, dtype, dtype, activation=activation)


def mixes(kind: str, problem: Problem, device: Device) -> list[Mix]:
    """Return every mix that takes a plan of this kind for this problem.

    float16 is left out: its elements are as wide as bfloat16's. A vector of scales stages at least
    what one learned scale does. Biases come with a scaling and go with it, so that every mix of
    dtypes occurs without; sizes that no tile divides come with the widest and the narrowest.
    """
    half, single = torch.bfloat16, torch.float32
    found = []
    for x, products in ((half, half), (single, half), (single, single)):
        weights = dict.fromkeys((products, single))
        optional = (None, half, single)
        block = [
            Mix(x, w, products, added, scaling, bias=scaling is not None)
            for w, added, scaling in itertools.product(weights, optional, optional)
        ]
        block += [block[0]._replace(odd=True), block[-1]._replace(odd=True)]
        found += [mix for mix in block if _parts(kind, mix, problem, device)]
    return found


def widest(kind: str, problem: Problem, device: Device) -> Mix:
    """Return the mix that most often asks for the most shared memory: float32 wherever it may be,
    and no scaling, whose vector takes less than 1 KB.
    """

    def width(mix: Mix) -> int:
        types = mix.x, mix.weights, mix.added
        return sum(dtype.itemsize for dtype in types if dtype is not None)

    found = mixes(kind, problem, device)
    return max((mix for mix in found if mix.scaling is None), key=width)


def _parts(kind: str, mix: Mix, problem: Problem, device: Device) -> set[str]:
    """Return which launches of such a call take a plan of this kind for this arithmetic."""
    with _precision(problem):
        call = mix.call(16, 16, 16, "meta")
        dy = torch.empty_like(call.x, dtype=call.output_dtype)
        if kind == "weights":
            asked = {"backward": backend.weights_problem(call, call.x, dy, device)}
        else:
            asked = {
                "forward": backend.forward_problem(call, call.x, device),
                "backward": backend.dx_problem(call, dy, device),
            }
    return {part for part, one in asked.items() if one[3:] == problem[3:]}


@contextmanager
def _precision(problem: Problem) -> Iterator[None]:
    """Set torch's precision of float32 products to the one under which the problem arises."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if problem.ieee else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compile_entry(
    entry: Entry, mix: Mix, capability: int, device: Device, timed: bool = False
) -> list[Any]:
    """Compile the launches of a recording forward and its backward with an entry's tiles.

    The forward or the backward is left out where the entry does not serve it. timed: leave out
    nothing, and compile the forward that records nothing too, so that a search compiles nothing.

    Raises:
        triton.runtime.errors.OutOfResources: more shared memory than the GPU has; what else
            Triton's compiler raises.
    """
    from adapterkern.backends.triton.compile_only import compile_only  # needs triton itself

    tokens, hidden, bottleneck = entry.problem[:3]
    if mix.odd:
        tokens, hidden, bottleneck = tokens + 1, hidden + 3, max(1, bottleneck - 1)
    call = mix.call(tokens, hidden, bottleneck)
    upstream, saved = empty_outputs(call, save=True)
    needs = Needs(True, True, True, mix.bias, mix.bias, scaling=mix.scaling is not None)
    parts = _parts(entry.kind, mix, entry.problem, device)
    kernels = backend.TritonBackend()
    with (
        _precision(entry.problem),
        compile_only(capability, device) as launches,
        tuned.forced(entry),
    ):
        if "forward" in parts or timed:
            kernels.forward(call, True)
        if timed:
            kernels.forward(call, False)
        if "backward" in parts or timed:
            kernels.backward(call.for_backward(needs), saved, upstream, needs)
    return launches
