"""The parity gate judges each tensor by the rule of `adapterkern.parity`."""

from dataclasses import replace

import pytest
import torch

from adapterkern import parity
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.gate import Gate
from adapterkern.bench.measure import outputs_of
from adapterkern.bench.providers import PROVIDERS

CASE = BenchCase(48, 8, 33, "fp32", "gelu", "step")


def judged(inputs, **changes):
    """Return the verdict on what plain layers give for these inputs, some tensors exchanged."""
    built = PROVIDERS["plain"].build(CASE, inputs)
    outputs = outputs_of(built, CASE, inputs) | changes
    return Gate(CASE, inputs).judge(outputs, built.activation, tuple(built.parameters))


@pytest.fixture
def without_up():
    """Where W_up is zero, the gradients of W_down and b_down are zero too."""
    inputs = CASE.draw("cpu")
    up = torch.zeros_like(inputs.parameters["up_weight"])
    return replace(inputs, parameters=inputs.parameters | {"up_weight": up})


def test_a_gradient_that_must_be_zero_may_be_zero(without_up):
    verdict = judged(without_up)
    assert verdict.passed
    assert verdict.error > 0  # the closest to its tolerance is another


def test_a_gradient_that_must_be_zero_fails_the_gate_at_1e_7(without_up):
    almost = torch.full((8, 48), 1e-7)
    verdict = judged(without_up, d_down_weight=almost)
    assert verdict.tensor == "d_down_weight"
    assert verdict.error == pytest.approx(1e-7)
    assert verdict.tolerance == 0.0
    assert not verdict.passed


def test_the_gate_allows_what_parity_allows():
    inputs = CASE.draw("cpu")
    oracle = torch.tensor([3.0, 4.0], dtype=torch.float64)
    eager = oracle * (1 + 1e-4)
    for name, allowance in (("y", 2.0), ("y (no grad)", 2.0), ("dx", 3.0)):
        found = parity.judge(name, oracle * (1 + 1e-3), oracle, [oracle, eager], torch.float32)
        assert found == pytest.approx((1e-3, allowance * 1e-4))
    rounded = parity.judge("y", oracle, oracle, [oracle], torch.bfloat16)
    assert rounded == (0.0, 2.4e-3)
    for factor, passed in ((1.0, True), (1 + 1e-5, False)):
        y = PROVIDERS["plain"].build(CASE, inputs).forward(inputs.x).detach() * factor
        assert judged(inputs, y=y).passed is passed


@pytest.mark.parametrize(
    ("error", "tolerance", "part"),
    [
        (1.0, 4.0, 0.25),
        (0.0, 0.0, 0.0),
        (1e-9, 0.0, float("inf")),
        (float("nan"), 1.0, float("inf")),
        (float("inf"), 0.0, float("inf")),
        (1.0, float("nan"), float("nan")),
    ],
)
def test_the_part_of_a_tolerance_that_is_used_up(error, tolerance, part):
    assert parity.share(error, tolerance) == pytest.approx(part, nan_ok=True)
