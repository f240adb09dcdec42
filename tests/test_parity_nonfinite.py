"""adapterkern.parity: how Inf and NaN in x and dy are judged, and the reference under it."""

import math
from dataclasses import replace

import pytest
import torch

from adapterkern import parity
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.parity import Case, check_case
from adapterkern.results import Outputs

HALVES = (torch.float16, torch.bfloat16)
NONFINITE = Case(activation="tanh", nonfinite=True)


def missed(case) -> set[str]:
    return {row.tensor for row in check_case(case, "reference") if not row.passed}


def spoil(monkeypatch, change):
    forward = ReferenceBackend.forward

    def spoilt(self, call, save):
        outputs, saved = forward(self, call, save)
        return Outputs(change(outputs.y)), saved

    monkeypatch.setattr(ReferenceBackend, "forward", spoilt)


def test_nonfinite_values_lie_in_a_few_tokens_and_leave_the_others_finite():
    tensors = NONFINITE.draw("cpu", seed=0)
    dy = NONFINITE.draw_grad_output(NONFINITE.make_call(tensors), seed=0)
    for tensor, tokens in ((tensors["x"], [1, 3, 5]), (dy, [7, 9, 11])):
        assert (~tensor.isfinite()).any(1).nonzero().flatten().tolist() == tokens
        planted = [tensor[token][~tensor[token].isfinite()].tolist() for token in tokens]
        assert planted[:2] == [[math.inf], [-math.inf]]
        assert len(planted[2]) == 1
        assert math.isnan(planted[2][0])
    with pytest.raises(ValueError, match="at least 13 tokens, so that some stay finite; got 12"):
        replace(NONFINITE, shape=(12,)).draw("cpu", seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bottleneck", [3, 20])
def test_reference_has_inf_and_nan_where_eager_has_them(dtype, activation, bottleneck):
    case = replace(NONFINITE, dtype=dtype, activation=activation, bottleneck_size=bottleneck)
    assert missed(case) == set()


@pytest.mark.parametrize(
    ("row", "value"),
    [(1, math.nan), (1, math.inf), (5, 0.0), (5, math.inf), (0, math.inf), (0, math.nan)],
    ids=["Inf to NaN", "a finite row to Inf", "NaN to 0", "NaN to Inf", "0 to Inf", "0 to NaN"],
)
def test_nonfinite_case_misses_an_element_of_another_kind(monkeypatch, row, value):
    """tanh keeps a token with Inf in x finite but for one element; a token with NaN is all NaN."""

    def change(y):
        y = y.clone()
        y[row, 0] = value
        return y

    spoil(monkeypatch, change)
    assert missed(NONFINITE) == {"y", "y (no grad)"}
    note = check_case(NONFINITE, "reference")[0].note
    assert (
        note == "1 of the 2590 elements that float64 and eager agree on are another of finite, "
        "Inf, -Inf and NaN"
    )


def test_nonfinite_case_judges_the_finite_elements_as_ever(monkeypatch):
    spoil(monkeypatch, lambda y: y * (1 + 1e-6))
    assert missed(NONFINITE) == {"y", "y (no grad)"}


def test_nonfinite_case_asks_nothing_where_eager_overflows(monkeypatch):
    """Where eager has Inf and float64 has not, any value will do; elsewhere none but the same."""
    out, oracle = torch.tensor([5.0, 1.0]), torch.tensor([7e4, 1.0], dtype=torch.float64)
    eager = torch.tensor([math.inf, 1.0], dtype=torch.float16)
    judge = parity._judge("reference", NONFINITE, "y", [[out.half(), oracle, eager]])
    assert judge.passed
    out[1] = math.inf
    assert not parity._judge("reference", NONFINITE, "y", [[out.half(), oracle, eager]]).passed
