"""adapterkern.parity: cases with a norm behind the adapter, and what the rule finds in them."""

import math

import numpy as np
import pytest
import torch

from adapterkern import norm, parity
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends.base import NORM_FEATURES
from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.parity import Case, check_case, differing_bits, grid
from adapterkern.results import Outputs

LAYER = Case(norm="layer", prenorm=True, skip=True)
RMS = Case(norm="rms", norm_affine="weight", weight_offset=1.0)
FORWARD = {"y", "y (no grad)", "normed", "normed (no grad)"}


def missed(case) -> set[str]:
    return {row.tensor for row in check_case(case, "reference") if not row.passed}


def plant(monkeypatch, name, replacement):
    """Replace a function of norm.py where the backend runs: the oracle and eager keep the right."""
    for method in ("forward", "backward"):
        right = getattr(ReferenceBackend, method)

        def wrong(self, *arguments, right=right):
            with monkeypatch.context() as patch:
                patch.setattr(norm, name, replacement)
                return right(self, *arguments)

        monkeypatch.setattr(ReferenceBackend, method, wrong)


def test_check_case_compares_both_outputs_and_every_gradient():
    rows = check_case(LAYER, "reference")
    assert [row.tensor for row in rows] == [
        "y", "y (no grad)", "normed", "normed (no grad)", "dx", "d_down_weight", "d_up_weight",
        "d_down_bias", "d_up_bias", "d_skip", "d_norm_weight", "d_norm_bias",
    ]  # fmt: skip
    frozen = Case(norm="rms", needs=("norm_weight",), prenorm=False)
    tensors = [row.tensor for row in check_case(frozen, "reference")]
    assert tensors == ["normed", "normed (no grad)", "d_norm_weight"]


def test_case_id_reads_as_its_norm():
    plain = Case(torch.bfloat16, hidden_size=768, bottleneck_size=48, norm="layer", prenorm=True)
    assert str(plain) == "bf16-gelu-T37-H768-R48-layer_norm-prenorm"
    assert str(Case(norm="rms", norm_affine="none", eps=0.5, shift=1000.0, skip=True)) == (
        "fp32-gelu-T37-H70-R20-skip-skip_shifted_1000-rms_norm-affine_none-eps_0.5"
    )
    cast = Case(norm="rms", norm_affine="weight", weight_offset=1.0, cast_before_weight=True)
    assert str(cast) == "fp32-gelu-T37-H70-R20-rms_norm-affine_weight-offset_1-cast"


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_oracle_is_the_norm_in_float64_of_the_unrounded_sum(kind):
    """As numpy computes it; the parameters of the norm enter no product and are not rounded."""
    case = Case(torch.bfloat16, "identity", norm=kind, parameter_dtype=torch.float32, prenorm=True)
    tensors = case.draw("cpu", seed=0)
    call = case.make_call(tensors)
    upstream = case.draw_upstream(call, seed=0)
    assert [d.dtype for d in upstream] == [torch.bfloat16, torch.float32]
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    wide_up = Outputs(*[d.double() for d in upstream])
    oracle = parity._run_plain(case, wide, wide_up, operands_in=torch.bfloat16)

    def rounded(name):
        return tensors[name].bfloat16().double().numpy()

    z = rounded("x") @ rounded("down_weight").T + rounded("down_bias")
    y = rounded("x") + z @ rounded("up_weight").T + rounded("up_bias")
    centered = y - y.mean(1, keepdims=True) if kind == "layer" else y
    xhat = centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-5)
    normed = xhat * wide["norm_weight"].numpy() + wide["norm_bias"].numpy()
    d_weight = (wide_up.normed.numpy() * xhat).sum(0)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(oracle["y"].detach().numpy(), y, **tight)
    np.testing.assert_allclose(oracle["normed"].detach().numpy(), normed, **tight)
    np.testing.assert_allclose(oracle["d_norm_weight"].numpy(), d_weight, **tight)


def statistics_of_a_wrong_mean(call, y, right=norm.statistics):
    mean, rstd = right(call, y)
    return None if mean is None else mean * 1.001, rstd


def statistics_in_one_pass(call, y):
    """The mean of the squares less the square of the mean."""
    mean = y.mean(-1)
    return mean, (y.square().mean(-1) - mean.square() + call.eps).rsqrt()


def backward_without(dropped, right=norm.backward):
    def backward(call, stream, statistics, d_normed, d_stream, needs):
        if dropped == "d_stream":
            d_stream = None
        elif dropped == "statistics":
            statistics = (0 * statistics[0], statistics[1])
        elif dropped == "offset":
            call = call._replace(weight_offset=0.0)
        elif dropped == "mean of g":
            call, statistics = call._replace(norm="rms"), statistics
        return right(call, stream, statistics, d_normed, d_stream, needs)

    return backward


ADAPTERS = {"dx", "d_down_weight", "d_up_weight", "d_down_bias", "d_up_bias"}
FAULTS = {
    "wrong mean": (LAYER, "statistics", statistics_of_a_wrong_mean, {"d_norm_weight"}),
    "no d_stream": (LAYER, "backward", backward_without("d_stream"), ADAPTERS | {"d_skip"}),
    "no mean": (LAYER, "backward", backward_without("statistics"), {"d_norm_weight", "d_skip"}),
    "no mean of g": (LAYER, "backward", backward_without("mean of g"), ADAPTERS | {"d_skip"}),
    "no offset": (RMS, "backward", backward_without("offset"), ADAPTERS),
}


@pytest.mark.parametrize(("case", "name", "fault", "found"), FAULTS.values(), ids=FAULTS)
def test_check_case_misses_a_fault_in_the_norm(monkeypatch, case, name, fault, found):
    assert missed(case) == set()
    plant(monkeypatch, name, fault)
    assert missed(case) >= found


def test_a_mean_far_from_zero_finds_a_variance_in_one_pass(monkeypatch):
    shifted = Case(norm="layer", skip=True, shift=1000.0)
    assert missed(shifted) == set()
    plant(monkeypatch, "statistics", statistics_in_one_pass)
    assert missed(Case(norm="layer", skip=True)) == set()
    assert missed(shifted) >= {"d_norm_weight", "d_skip"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["norm_weight", "norm_bias"])
def test_check_case_misses_a_gradient_of_the_norm_that_is_off_by_five_percent(
    monkeypatch, dtype, name
):
    backward = ReferenceBackend.backward

    def spoilt(self, *arguments):
        gradients = backward(self, *arguments)
        return gradients._replace(**{name: getattr(gradients, name) * 1.05})

    monkeypatch.setattr(ReferenceBackend, "backward", spoilt)
    assert missed(Case(dtype, norm="layer")) == {f"d_{name}"}


def spoil_forward(monkeypatch, change):
    forward = ReferenceBackend.forward

    def spoilt(self, call, save):
        outputs, saved = forward(self, call, save)
        return change(outputs), saved

    monkeypatch.setattr(ReferenceBackend, "forward", spoilt)


def test_check_case_judges_each_output_on_its_own(monkeypatch):
    spoil_forward(monkeypatch, lambda outputs: outputs._replace(normed=outputs.normed * (1 + 1e-6)))
    assert missed(LAYER) == {"normed", "normed (no grad)"}
    spoil_forward(monkeypatch, lambda outputs: outputs._replace(y=outputs.y * (1 + 1e-6)))
    assert missed(LAYER) >= FORWARD


def test_inf_and_nan_stay_in_their_tokens(monkeypatch):
    """A norm makes all of a token NaN whose mean is; none of its neighbours."""
    case = Case(activation="tanh", nonfinite=True, norm="layer")
    tensors = case.draw("cpu", seed=0)
    upstream = case.draw_upstream(case.make_call(tensors), seed=0)
    assert upstream.y is None
    planted = ~upstream.normed.isfinite()
    assert planted.any(1).nonzero().flatten().tolist() == [7, 9, 11]
    assert upstream.normed[planted].isnan().all()  # Inf among sums is a matter of their order
    assert missed(case) == set()

    def spill(outputs):
        normed = outputs.normed.clone()
        assert normed[1].isnan().all()
        normed[2, 0] = math.nan
        return outputs._replace(normed=normed)

    spoil_forward(monkeypatch, spill)
    assert missed(case) == {"normed", "normed (no grad)"}


def test_differing_bits_looks_at_the_norm_too(monkeypatch):
    assert differing_bits(LAYER, "reference") == []
    runs = iter(range(10))
    spoil_forward(monkeypatch, lambda o: o._replace(normed=o.normed + 1e-3 * next(runs)))
    assert differing_bits(LAYER, "reference") == ["normed", "normed (no grad)"]


@pytest.mark.parametrize("small", [True, False])
def test_grid_has_norms_where_a_backend_declares_them(small):
    dtypes = {torch.float32, torch.bfloat16}

    def norms(level, features):
        cases = grid(dtypes, ACTIVATIONS, level, small, features)
        assert len({str(case) for case in cases}) == len(cases)
        return [case for case in cases if case.norm != "none"]

    assert not norms("default", ())
    assert not norms("quick", NORM_FEATURES)  # every dtype and activation, once
    assert {case.norm for case in norms("default", {"rms_norm"})} == {"rms"}
    cases = norms("default", NORM_FEATURES)
    assert set(cases) < set(norms("full", NORM_FEATURES))
    assert len({(case.norm, case.dtype) for case in cases}) == 2 * 2
    assert len({(case.prenorm, case.dtype) for case in cases}) == 2 * 2
    assert {case.norm_affine for case in cases} == {"both", "weight", "none"}
    assert {case.weight_offset for case in cases} == {0.0, 1.0}
    assert {case.cast_before_weight for case in cases} == {False, True}
    assert {case.shift for case in cases} == {0.0, 1000.0}
    assert {case.autocast for case in cases} == {None, torch.bfloat16}
    assert {case.nonfinite for case in cases} == {False, True}
    assert {case.shape for case in cases} >= {(0,), (1,)}
    of_norm = {"norm_weight", "norm_bias"}
    frozen = [set(case.needs) & of_norm for case in cases if case.needs is not None]
    assert set() in frozen
    assert of_norm in frozen
