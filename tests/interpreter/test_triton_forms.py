"""Every form of the Triton kernels, in every declared dtype and with every declared activation."""

import itertools
from dataclasses import replace

import pytest
import torch
from forms import FORMS
from special_values import assert_gradient_is_autograds

from adapterkern.backends import get
from adapterkern.parity import Case, check_case, differing_bits, metric
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.validation import name_of

pytestmark = pytest.mark.interpreter
triton = get("triton")
DTYPES = sorted(triton.dtypes, key=name_of)
ACTIVATIONS = sorted(triton.activations)


def _cases() -> dict[str, tuple[str, Case]]:
    """Either kind of form in every dtype with every activation; where slices of H or T, or several
    tiles of R, are all that is new, the activations take turns through the dtypes."""
    cases = {}
    for form, (index, activation) in itertools.product(FORMS, enumerate(ACTIVATIONS)):
        every_dtype = form in ("row_block", "split")
        for dtype in DTYPES if every_dtype else [DTYPES[index % len(DTYPES)]]:
            case = Case(dtype=dtype, activation=activation, **FORMS[form].sizes)
            cases[f"{form}-{case}"] = form, case
    return cases


CASES = _cases()


def missed(case: Case) -> str:
    return "\n".join(str(row) for row in check_case(case, "triton") if not row.passed)


@pytest.mark.sweep("form", lambda p: p["case"].dtype, lambda p: p["case"].activation)
@pytest.mark.parametrize(("form", "case"), CASES.values(), ids=CASES.keys())
def test_triton_matches_float64_in_every_form(run_as, form, case):
    run_as(form)
    assert not missed(case)


one_of_each_kind = pytest.mark.sweep(lambda p: FORMS[p["form"]].row_block)


@one_of_each_kind
@pytest.mark.parametrize("form", FORMS)
def test_triton_repeats_bit_for_bit(run_as, form):
    run_as(form)
    case = Case(dtype=torch.bfloat16, scaling="channel", skip=True, **FORMS[form].sizes)
    assert differing_bits(case, "triton") == []


@pytest.mark.sweep("form", "dtype")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_triton_zero_up_projection_returns_the_residual_bit_for_bit(run_as, form, dtype):
    run_as(form)
    case = Case(dtype=dtype, bias="down", activation="sigmoid", **FORMS[form].sizes)
    tensors = case.draw("cpu", seed=0)
    tensors["up_weight"].zero_()
    y = triton.forward(case.make_call(tensors), save=False)[0].y
    assert torch.equal(y, tensors["x"])


@pytest.mark.parametrize("form", FORMS)
def test_triton_nan_stays_in_its_row(run_as, form):
    """A NaN in x makes its token NaN, as in eager, and no other: with relu too."""
    run_as(form)
    case = Case(activation="relu", residual="none", **FORMS[form].sizes)
    tensors = case.draw("cpu", seed=0)
    tensors["x"][3, 5] = torch.nan
    y = triton.forward(case.make_call(tensors), save=False)[0].y
    rows = y.isnan().any(1)
    assert y[3].isnan().all()
    assert rows.sum() == 1


@pytest.mark.sweep("form", "dtype")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("activation", "bottleneck"), [("tanh", None), ("sigmoid", 3), ("relu", None)]
)
def test_triton_has_inf_and_nan_where_eager_has_them(run_as, form, dtype, activation, bottleneck):
    """Inf in a token makes act(z) 1 or 0 in the units that are there, and must not become NaN in
    those that only fill up the tile. With few units, gradients are Inf as often as NaN."""
    if bottleneck is not None and form == "split_wide":
        pytest.skip("a wide form has many units")
    run_as(form)
    case = Case(dtype=dtype, activation=activation, nonfinite=True, **FORMS[form].sizes)
    assert not missed(replace(case, bottleneck_size=bottleneck or case.bottleneck_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_gradients_of_special_values_are_autograds(activation, dtype):
    assert_gradient_is_autograds(triton, activation, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("form", FORMS)
def test_triton_computes_only_the_gradients_asked_for(run_as, form):
    """Those asked for equal the full set's, the others are absent: every subset of the six on the
    fastest form, each alone on the others."""
    run_as(form)
    case = Case(scaling="channel", **FORMS[form].sizes)
    call = case.make_call(case.draw("cpu", seed=0))
    upstream = Outputs(case.draw_grad_output(call, seed=0))
    _, saved = triton.forward(call, save=True)
    full = triton.backward(call, saved, upstream, Needs(*[True] * 8))
    assert full.residual is full.skip is upstream.y
    for subset in itertools.product((False, True), repeat=6):
        if form != "split" and sum(subset) != 1:
            continue
        needs = Needs(*subset[:5], scaling=subset[5])
        kept = saved if needs.z else Saved(None)
        gradients = triton.backward(call.for_backward(needs), kept, upstream, needs)
        assert [gradient is not None for gradient in gradients] == list(needs)
        for gradient, expected in zip(gradients, full, strict=True):
            assert gradient is None or metric(gradient, expected) < 2e-7


@pytest.mark.parametrize("form", FORMS)
def test_triton_one_token_is_a_slice_of_many_in_float32(run_as, form):
    """float32 is IEEE by default: a batch and its slice agree to 1e-5, whatever form each takes."""
    case = Case(**FORMS[form].sizes)
    tensors = case.draw("cpu", seed=0)
    first = case.make_call({**tensors, "x": tensors["x"][7:8]})
    alone = triton.forward(first, save=False)[0].y
    run_as(form)
    together = triton.forward(case.make_call(tensors), save=False)[0].y
    assert (together[7] - alone[0]).abs().max() < 1e-5
