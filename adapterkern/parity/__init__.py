"""The one rule of rightness: against what a result is compared, and how far it may be off.

- Oracle: the reference in plain operations and its autograd gradients, in float64 on the same
  inputs, those of the products rounded to the compute dtype, as every implementation has to round
  them.
- Metric: rms(out - oracle) / rms(oracle), because near a ReLU kink one flipped sign is legitimate.
  Where the oracle is zero throughout, so must the output be.
- Tolerance: `FORWARD_ALLOWANCE` (gradients: `GRADIENT_ALLOWANCE`) times the metric of eager, the
  same composition in plain torch operations, in the compute dtype, on the same device, but at
  least one rounding of the output (`FLOORS`). NaN never passes. For TF32 it is the larger of
  eager's metric and that of products with truncated operands (`TruncatedProducts` says why).
- Inf and NaN, in the cases that have them in x and dy: an element is finite, Inf, -Inf or NaN where
  oracle and eager agree that it is; the metric runs over those that are finite in both. Where the
  two disagree, as where float16 overflows, nothing is asked.

Oracle and eager get contiguous copies of the inputs, the backend the tensors as they lie: with bf16
on CPUs with AMX, torch's own F.linear reads the gap behind a row whose width is no multiple of 32,
and gives NaN where there is NaN (https://github.com/uxlfoundation/oneDNN/issues/5717).

Run it under `testing.nan_filled_memory`: then a read of unwritten memory or a hole in an output
fails too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkern.backends import get
from adapterkern.parity.cases import LAYOUTS, SHORT_NAMES, Case, place
from adapterkern.parity.grid import LEVELS, grid, options
from adapterkern.parity.grouped import GroupedCase
from adapterkern.parity.grouped import cases as grouped_cases
from adapterkern.parity.tf32 import TruncatedProducts
from adapterkern.results import Outputs
from adapterkern.validation import name_of

__all__ = [
    "FLOORS",
    "FORWARD_ALLOWANCE",
    "GRADIENT_ALLOWANCE",
    "LAYOUTS",
    "LEVELS",
    "SHORT_NAMES",
    "AnyCase",
    "Case",
    "GroupedCase",
    "Row",
    "TruncatedProducts",
    "check_case",
    "differing_bits",
    "grid",
    "grouped_cases",
    "judge",
    "metric",
    "options",
    "place",
    "refusals",
    "share",
]

AnyCase = Case | GroupedCase

FORWARD_ALLOWANCE = 2.0
GRADIENT_ALLOWANCE = 3.0
# Each is relative, about the rms of one rounding. float64 has no wider oracle: its floor is what
# two orders of summation may differ by.
FLOORS = {
    torch.float32: 2e-7,
    torch.float16: 3e-4,
    torch.bfloat16: 2.4e-3,
    torch.float64: 1e-14,
}


@dataclass(frozen=True)
class Row:
    """The verdict on one tensor of one case. `note` says what else is wrong: a dtype, a shape."""

    backend: str
    case: AnyCase
    tensor: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "MISSED"
        numbers = f"error {self.error:.2e}, tolerance {self.tolerance:.2e}"
        note = f" ({self.note})" if self.note else ""
        return f"{verdict} {self.backend}-{self.case} {self.tensor}: {numbers}{note}"


def check_case(case: AnyCase, backend: str, device: torch.device | str = "cpu") -> list[Row]:
    """Compare `backend` with the oracle: every output of the case, the same without autograd, and
    every gradient.

    Args:
        case: of one adapter, or a `GroupedCase` of many.
        backend: a registered name; the call runs through `bottleneck_adapter`, with a norm through
            `bottleneck_adapter_norm`, of many adapters through `grouped_bottleneck_adapter`, as a
            user's would.
        device: where the inputs lie.

    Returns:
        One row per tensor.

    Raises:
        BackendUnsupportedError: the backend cannot run this case (`refusals` tells beforehand).
    """
    with case.matmul_precision():
        runs = [_run(case, backend, device, seed) for seed in range(case.draws)]
    names = runs[0][2].keys()
    return [_judge(backend, case, name, [[o[name] for o in run] for run in runs]) for name in names]


def _run(
    case: AnyCase, backend: str, device: torch.device | str, seed: int
) -> tuple[dict[str, Tensor], ...]:
    """Run one draw of data through the backend, the oracle, eager, and for TF32 the composition
    with truncated operands."""
    tensors = case.draw(device, seed)
    call: Any = case.make_call(tensors)
    upstream = case.draw_upstream(call, seed)
    packed = {name: _packed(tensor) for name, tensor in tensors.items()}
    wide = {name: tensor.double() for name, tensor in packed.items()}
    packed_up = Outputs(*[None if d is None else _packed(d) for d in upstream])
    wide_up = Outputs(*[None if d is None else d.double() for d in packed_up])
    oracle = _run_plain(case, wide, wide_up, operands_in=call.compute_dtype)
    plain = [oracle, _run_plain(case, packed, packed_up)]
    if case.tf32:
        with TruncatedProducts():
            plain.append(_run_plain(case, wide, wide_up, operands_in=call.compute_dtype))
    return (_run_backend(case, tensors, upstream, backend), *plain)


def differing_bits(
    case: AnyCase, backend: str, device: torch.device | str = "cpu", runs: int = 4
) -> list[str]:
    """Return the tensors whose bits differ among `runs` runs of `backend` on the same inputs: from
    the third on a kernel backend repeats the launches of the second (`backends/repeat.py`).
    """
    tensors = case.draw(device, seed=0)
    call: Any = case.make_call(tensors)
    upstream = case.draw_upstream(call, seed=0)
    with case.matmul_precision():
        first = _run_backend(case, tensors, upstream, backend)
        differing: set[str] = set()
        for _ in range(runs - 1):
            other = _run_backend(case, tensors, upstream, backend)
            differing |= {n for n in first if not torch.equal(_bits(first[n]), _bits(other[n]))}
    return [name for name in first if name in differing]


def refusals(case: AnyCase, backend: str, device: torch.device | str = "cpu") -> list[str]:
    """Return every reason why `backend` cannot run `case`, empty if it can."""
    call = case.make_call(_leaves(case, case.draw(device, seed=0)))
    return get(backend).unsupported_reasons(call.spec())


def metric(out: Tensor, oracle: Tensor) -> float:
    """rms(out - oracle) / rms(oracle); rms(out) where the oracle is zero; 0 for empty tensors."""
    if oracle.numel() == 0:
        return 0.0
    scale = oracle.double().square().mean().sqrt()
    error = (out.double() - oracle.double()).square().mean().sqrt()
    return float(error / scale) if scale != 0 else float(error)


def judge(
    name: str, out: Tensor, oracle: Tensor, yardsticks: Sequence[Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """Return (error, tolerance) of one tensor by the rule above; names that begin with y or normed
    are the forward's. The values may be widened: `dtype` is the one in which `out` was stored."""
    allowance = FORWARD_ALLOWANCE if name.startswith(("y", "normed")) else GRADIENT_ALLOWANCE
    floor = FLOORS[dtype] if oracle.any() else 0.0
    largest = max(metric(yardstick, oracle) for yardstick in yardsticks)
    return metric(out, oracle), max(allowance * largest, floor)


def share(error: float, tolerance: float) -> float:
    """Return the part of its tolerance that an error uses up; infinite where it is not finite,
    and for any error where none is allowed."""
    if error == 0:
        return 0.0
    return error / tolerance if math.isfinite(error) and tolerance else math.inf


def _judge(backend: str, case: AnyCase, name: str, runs: list[list[Tensor]]) -> Row:
    """Return the row of one tensor, from its (out, oracle, eager, ...) in each draw of data."""
    out, _, eager = runs[0][:3]
    if (out.dtype, out.shape) != (eager.dtype, eager.shape):
        got, expected = (f"{name_of(t.dtype)} {list(t.shape)}" for t in (out, eager))
        return Row(backend, case, name, math.inf, 0.0, f"{got}, expected {expected}")
    outs, oracles, *yardsticks = (
        torch.cat([tensor.detach().flatten().double() for tensor in tensors])
        for tensors in zip(*runs, strict=True)
    )
    if case.nonfinite:
        kinds = [_kind(tensor) for tensor in (outs, oracles, *yardsticks)]
        agreed = torch.stack([kind == kinds[1] for kind in kinds[2:]]).all(0)
        wrong = int((agreed & (kinds[0] != kinds[1])).sum())
        if wrong:
            both = f"the {int(agreed.sum())} elements that float64 and eager agree on"
            note = f"{wrong} of {both} are another of finite, Inf, -Inf and NaN"
            return Row(backend, case, name, math.inf, 0.0, note)
        finite = agreed & oracles.isfinite()
        outs, oracles, *yardsticks = (t[finite] for t in (outs, oracles, *yardsticks))
    return Row(backend, case, name, *judge(name, outs, oracles, yardsticks, eager.dtype))


def _kind(tensor: Tensor) -> Tensor:
    """Return 0 where a number is finite, 1 and -1 at Inf and -Inf, 2 at NaN."""
    return torch.where(tensor.isnan(), 2, torch.where(tensor.isinf(), tensor.sign(), 0))


def _run_backend(
    case: AnyCase, tensors: dict[str, Tensor], upstream: Outputs, backend: str
) -> dict[str, Tensor]:
    """Run it within `case.matmul_precision`, which the backward asks for too."""
    leaves = _leaves(case, tensors)
    arguments = case.arguments(leaves)
    with case.precision(tensors["x"].device):
        outputs = case.call(arguments, backend)
        with torch.no_grad():
            alone = case.call(arguments, backend)
    return _results(case, outputs, alone, leaves, upstream)


def _run_plain(
    case: AnyCase,
    tensors: dict[str, Tensor],
    upstream: Outputs,
    operands_in: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run plain torch operations. `operands_in`: the dtype to which the oracle, float64, rounds
    what goes into the products."""
    leaves = _leaves(case, tensors)
    call: Any = case.make_call(leaves)
    if operands_in is not None:
        operands: dict[str, Any] = {
            name: _round_values(getattr(call, name), operands_in) for name in case.operands
        }
        residual = call.x if call.add_input else call.residual  # added as it is, not rounded
        call = call._replace(
            **operands, residual=residual, add_input=False, compute_dtype=torch.float64
        )
    outputs = case.plain(call)
    return _results(case, outputs, outputs, leaves, upstream)


def _round_values(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a float64 tensor with its values rounded to `dtype` and its gradient left alone."""
    if tensor is None:
        return None
    change = (tensor.to(dtype).double() - tensor).detach()
    return tensor + torch.where(tensor.isfinite(), change, 0.0)  # Inf - Inf would be NaN


def _packed(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _leaves(case: AnyCase, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = case.wanted(tensors)
    return {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}


def _results(
    case: AnyCase, outputs: Outputs, alone: Outputs, leaves: dict[str, Tensor], upstream: Outputs
) -> dict[str, Tensor]:
    """Return each output, the same of a call without autograd, and the gradients of the case."""
    results: dict[str, Tensor] = {}
    for name, output, other in zip(Outputs._fields, outputs, alone, strict=True):
        if output is not None and other is not None:
            results |= {name: output, f"{name} (no grad)": other}
    wanted = case.wanted(leaves)
    if not wanted:
        return results
    # With a frozen adapter the stream has no gradient.
    pairs = [(y, d) for y, d in zip(outputs, upstream, strict=True) if y is not None]
    pairs = [(y, d) for y, d in pairs if y.requires_grad]
    ys, ds = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(ys, [leaves[name] for name in wanted], ds)
    names = ["dx" if name == "x" else f"d_{name}" for name in wanted]
    return results | dict(zip(names, gradients, strict=True))


def _bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])
