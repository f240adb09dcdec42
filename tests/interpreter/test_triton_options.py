"""Every option of a call on the Triton kernels, and proof that these tests can fail."""

import numpy as np
import pytest
import torch
from forms import FORMS
from thorough import fields_of

from adapterkern.backends import get
from adapterkern.backends.triton import launches as triton_launches
from adapterkern.backends.triton.activations import GRADIENTS, VALUES
from adapterkern.backends.triton.backend import TritonBackend
from adapterkern.parity import Case, check_case, grid, options, refusals
from adapterkern.results import Needs, Outputs, Saved

pytestmark = pytest.mark.interpreter
triton = get("triton")
OPTIONS = {
    f"{form}-{case}": (form, case)
    for form, every_dtype in (("row_block", True), ("split_features", False))
    for case in options(Case(**FORMS[form].sizes), triton.dtypes, every_dtype)
}
SIZES = {
    str(case): case
    for case in grid(triton.dtypes, ["gelu"], "default", small=True)
    if case
    == Case(
        dtype=case.dtype,
        shape=case.shape,
        hidden_size=case.hidden_size,
        bottleneck_size=case.bottleneck_size,
    )
}


def missed(case: Case) -> list[str]:
    return [str(row) for row in check_case(case, "triton") if not row.passed]


@pytest.mark.sweep("form", *fields_of("case", Case))
@pytest.mark.parametrize(("form", "case"), OPTIONS.values(), ids=OPTIONS.keys())
def test_triton_matches_float64_with_every_option(run_as, form, case):
    reasons = refusals(case, "triton")
    if reasons:
        pytest.skip("; ".join(reasons))
    run_as(form)
    assert not missed(case)


@pytest.mark.sweep
@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES.keys())
def test_triton_matches_float64_at_ragged_sizes_in_the_form_it_chooses(case):
    assert not missed(case)


@pytest.mark.sweep
@pytest.mark.parametrize("form", ["row_block", "split", "token_slices"])
def test_triton_offsets_survive_rows_beyond_2_to_the_31_elements(run_as, form):
    """x, residual and dy are views whose last row begins behind element 2^31 of their memory."""
    run_as(form)
    sizes = FORMS[form]
    stride = 2**31 // (sizes.tokens - 1) + 1
    memory = np.empty(sizes.tokens * stride, np.float16)  # only the pages of the rows are touched
    far = torch.from_numpy(memory)
    case = Case(dtype=torch.float16, residual="tensor", **sizes.sizes)
    near = case.draw("cpu", seed=0)
    call = case.make_call(near)
    dy = case.draw_grad_output(call, seed=0)
    views = []
    for index, tensor in enumerate((near["x"], near["residual"], dy)):
        view = far.as_strided(tensor.shape, (stride, 1), index * sizes.hidden_size)
        views.append(view.copy_(tensor))
    far_call = case.make_call({**near, "x": views[0], "residual": views[1]})
    for expected, got in zip(_run(call, dy), _run(far_call, views[2]), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("form", ["row_block", "split_features"])
def test_triton_takes_a_z_that_was_packed_meanwhile(run_as, form):
    """As a hook on saved tensors may return it; here rows of 20 come 24 elements apart, and what
    lies between them is NaN."""
    run_as(form)
    case = Case(dtype=torch.bfloat16, **FORMS[form].sizes)
    call = case.make_call(case.draw("cpu", seed=0))
    upstream = Outputs(case.draw_grad_output(call, seed=0))
    _, saved = triton.forward(call, save=True)
    assert saved.z.stride() == (24, 1)
    needs = Needs(True, True, True, True, True)
    expected = triton.backward(call, saved, upstream, needs)
    saved.z.as_strided((saved.z.shape[0], 4), (24, 1), 20).fill_(torch.nan)
    for z in (saved.z, saved.z.contiguous()):
        found = triton.backward(call, Saved(z), upstream, needs)
        for gradient, other in zip(found, expected, strict=True):
            assert gradient is None or torch.equal(gradient, other)


def _run(call, dy) -> list[torch.Tensor]:
    outputs, saved = triton.forward(call, save=True)
    gradients = triton.backward(call, saved, Outputs(dy), Needs(True, True, True, True, True))
    return [t for t in (*outputs, *saved, *gradients) if t is not None]


# Each mutation breaks the backend in one place. The tensors that it must spoil are named below; all
# others must still pass, so that a miss points at its cause.


def _forward_without_residual(monkeypatch):
    forward = TritonBackend.forward
    monkeypatch.setattr(
        TritonBackend,
        "forward",
        lambda self, call, save: forward(self, call._replace(add_input=False), save),
    )


def _backward_without_residual(monkeypatch):
    backward = TritonBackend.backward
    monkeypatch.setattr(
        TritonBackend,
        "backward",
        lambda self, call, *rest: backward(self, call._replace(add_input=False), *rest),
    )


def _backward_without_scaling(monkeypatch):
    backward = TritonBackend.backward
    monkeypatch.setattr(
        TritonBackend,
        "backward",
        lambda self, call, *rest: backward(self, call._replace(scale=1.0), *rest),
    )


def _tanh_approximation_of_gelu(monkeypatch):
    monkeypatch.setitem(VALUES, "gelu", VALUES["gelu_tanh"])


def _tanh_approximation_of_gelu_derivative(monkeypatch):
    monkeypatch.setitem(GRADIENTS, "gelu", GRADIENTS["gelu_tanh"])


def _last_block_of_tokens_not_launched(monkeypatch):
    """Leave memory unwritten, which is NaN here."""
    monkeypatch.setattr(triton_launches, "cdiv", lambda a, b: max(1, a // b))


def _no_mask_on_the_features_of_x_and_dy(monkeypatch):
    """The last row's read runs over the end of the tensor, into the NaN that surrounds it; as the
    weights' masks are in place, nothing else would show. The kernels with 32 features a tile are
    those that only read along H."""
    tiles = triton_launches.tiles_of
    monkeypatch.setattr(
        triton_launches,
        "tiles_of",
        lambda call, config, stages: (
            tiles(call, config, stages) | ({"EVEN_H": True} if config.block_h == 32 else {})
        ),
    )


ALL = {"y", "y (no grad)", "dx", "d_down_weight", "d_up_weight", "d_down_bias", "d_up_bias"}
MUTATIONS = {
    _forward_without_residual: {"y", "y (no grad)"},
    _backward_without_residual: {"dx"},
    _backward_without_scaling: ALL - {"y", "y (no grad)"},
    _tanh_approximation_of_gelu: {"y", "y (no grad)", "d_up_weight"},
    _tanh_approximation_of_gelu_derivative: {"dx", "d_down_weight", "d_down_bias"},
    _last_block_of_tokens_not_launched: ALL,
    _no_mask_on_the_features_of_x_and_dy: ALL - {"d_up_bias"},
}


@pytest.mark.sweep
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__.strip("_"))
def test_parity_catches_a_broken_kernel_and_points_at_it(monkeypatch, mutate):
    case = Case(scaling=0.7)
    assert not missed(case)
    mutate(monkeypatch)
    spoilt = {row.tensor for row in check_case(case, "triton") if not row.passed}
    assert spoilt == MUTATIONS[mutate]
