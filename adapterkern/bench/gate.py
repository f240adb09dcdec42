"""The parity gate: a provider whose result is wrong gets no time.

The rule is `parity.judge`. Its yardsticks are eager in the same dtype on the same device and, where
float32 products may use TF32, products with truncated operands.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkern import parity, reference
from adapterkern.backends.base import allow_tf32
from adapterkern.bench.cases import EPS, BenchCase, Inputs, parameter
from adapterkern.grouped.functional import grouped_bottleneck_adapter
from adapterkern.grouped.routing import AdapterRouting
from adapterkern.results import given_of
from adapterkern.spec import AdapterCall, make_call, with_norm

Tensors = dict[str, Tensor]  # y, dx and d_<parameter> by name
RUNS = 10  # whose bits are compared


@dataclass(frozen=True)
class Verdict:
    """The tensor closest to its tolerance."""

    tensor: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"{self.tensor}: error {self.error:.1e}, tolerance {self.tolerance:.1e}"


class Gate:
    """Compares providers on one case; oracle and eager are computed once for each formula."""

    def __init__(self, case: BenchCase, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self._truths: dict[tuple, tuple[Tensors, list[Tensors]]] = {}

    def judge(
        self, outputs: dict[str, Tensor], activation: str, parameters: tuple[str, ...]
    ) -> Verdict:
        """Return the verdict on the worst of `outputs`.

        Args:
            outputs: y, and in a mode with gradients dx and d_<parameter> for each parameter.
            activation, parameters: those of the provider's formula, which may differ from the
                case's and lack biases; their values are the case's in any event.
        """
        oracle, yardsticks = self._truth(activation, parameters)
        missing = sorted(oracle.keys() - outputs.keys())
        if missing:
            return Verdict(f"{missing[0]} (missing)", float("inf"), 0.0)
        verdicts = [
            _compare(name, output, oracle.get(name), [them.get(name) for them in yardsticks])
            for name, output in outputs.items()
        ]
        return max(verdicts, key=lambda verdict: parity.share(verdict.error, verdict.tolerance))

    def _truth(self, activation: str, parameters: tuple[str, ...]) -> tuple[Tensors, list[Tensors]]:
        """Return the oracle, and the results whose errors bound what is allowed, eager first."""
        key = activation, parameters
        if key not in self._truths:
            found = {name: parameter(self.inputs.parameters, name) for name in parameters}
            tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
            tensors["x"] = self.inputs.x
            widened = {name: tensor.double() for name, tensor in tensors.items()}
            gradients, wide_dy = self.case.mode != "forward", self.inputs.dy.double()

            def result(tensors: Tensors, dy: Tensor) -> Tensors:
                return _reference(self.case, tensors, dy, activation, gradients)

            yardsticks = [result(tensors, self.inputs.dy)]
            if self.case.torch_dtype == torch.float32 and allow_tf32():
                with parity.TruncatedProducts():
                    yardsticks.append(result(widened, wide_dy))
            self._truths[key] = result(widened, wide_dy), yardsticks
        return self._truths[key]


def _reference(
    case: BenchCase, tensors: Tensors, dy: Tensor, activation: str, gradients: bool
) -> Tensors:
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in tensors.items()}
    if case.kind == "many":
        y = _of_many(case, leaves, activation)
    else:
        y = given_of(reference.forward(_call_of(case, leaves, activation))[0])
    if not gradients:
        return {"y": y}
    computed = torch.autograd.grad(y, list(leaves.values()), dy)
    names = ["dx" if name == "x" else f"d_{name}" for name in leaves]
    return {"y": y.detach(), **dict(zip(names, computed, strict=True))}


def _call_of(case: BenchCase, tensors: Tensors, activation: str) -> AdapterCall:
    given: dict[str, Any] = dict(tensors)
    weight, bias = given.pop("norm_weight", None), given.pop("norm_bias", None)
    call = make_call(**given, activation=activation)
    if case.norm == "none":
        return call
    return with_norm(call, weight, bias, case.norm, EPS, 0.0, False, False)


def _of_many(case: BenchCase, tensors: Tensors, activation: str) -> Tensor:
    """y of stacks, or of the parts of stacks that a provider's leaves are; a provider that has the
    parts of one adapter alone gives it every token.
    """
    given = dict(tensors)
    x = given.pop("x")
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in given.items():
        stack, _, slot = name.partition(".")
        stacks.setdefault(stack, []).append(tensor[None] if slot else tensor)
    joined: dict[str, Any] = {name: torch.cat(parts) for name, parts in stacks.items()}
    slots = len(joined["down_weights"])
    ids = case.ids(x.device)
    routing = AdapterRouting(case.tokens, slots, device=x.device)
    routing.update(ids if slots == case.adapters else torch.zeros_like(ids))
    return grouped_bottleneck_adapter(
        x, routing=routing, activation=activation, backend="reference", **joined
    )


def _compare(
    name: str, out: Tensor, oracle: Tensor | None, yardsticks: list[Tensor | None]
) -> Verdict:
    bounds = [tensor for tensor in yardsticks if tensor is not None]
    if oracle is None or not bounds or out.shape != oracle.shape or out.dtype != bounds[0].dtype:
        return Verdict(f"{name} ({out.dtype}, {list(out.shape)})", float("inf"), 0.0)
    return Verdict(name, *parity.judge(name, out.detach(), oracle, bounds, out.dtype))


def repeats(outputs: Callable[[], Tensors]) -> bool:
    """Whether RUNS calls give the same bits. A race between a copy and a product shows now and
    then: a plan that has one went wrong in one call of twelve."""
    first = outputs()
    return all(
        torch.equal(first[name], tensor)
        for _ in range(RUNS - 1)
        for name, tensor in outputs().items()
    )
