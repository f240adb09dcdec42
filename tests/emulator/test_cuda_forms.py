"""Every form of the CUDA kernels, in every declared dtype and with every declared activation."""

import contextlib
import itertools
from dataclasses import replace

import cuda_emulator
import numpy as np
import pytest
import torch
from cuda_forms import FORMS
from emulated import emulated
from special_values import assert_gradient_is_autograds
from thorough import fields_of

from adapterkern.backends import get
from adapterkern.backends.cuda import backend as cuda_backend
from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.facts import Device
from adapterkern.backends.cuda.launch_config import (
    Slices,
    TokenPlan,
    token_plan,
    token_slices,
    token_stages,
)
from adapterkern.backends.cuda.params import (
    ACTIVATIONS,
    NOTHING,
    BackwardParams,
    ForwardParams,
    View,
)
from adapterkern.parity import (
    Case,
    check_case,
    differing_bits,
    grid,
    metric,
    options,
)
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.validation import name_of

ALL = Needs(*[True] * 8)
DTYPES = sorted(CudaBackend.dtypes, key=name_of)
SCHEDULES = list(cuda_emulator.SCHEDULES)
PAIRS = [(name, dtype) for name, form in FORMS.items() for dtype in DTYPES if form.takes(dtype)]
each_form_and_dtype = pytest.mark.parametrize(
    ("form", "dtype"), PAIRS, ids=[f"{form}-{name_of(dtype)}" for form, dtype in PAIRS]
)


@pytest.fixture
def run_as(kernels):
    """run_as(form, schedule): every later call has to take that form."""
    with contextlib.ExitStack() as stack:

        def choose(name: str, schedule: str = "round_robin") -> None:
            form = FORMS[name]
            stack.enter_context(emulated(kernels, form.device))
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(kernels, "seed", cuda_emulator.SCHEDULES[schedule])

            def checked_token_plan(*arguments):
                plan = token_plan(*arguments)
                assert plan.slices.number == form.feature_slices
                assert plan.cluster_tokens == form.cluster_tokens
                assert (plan.resident_clusters > 0) == form.resident
                assert plan.large_tiles == form.large_tiles
                return plan

            def checked_token_slices(*arguments):
                slices = token_slices(*arguments)
                assert (slices.number > 1) == form.token_slices
                return slices

            def checked_token_stages(*arguments):
                assert token_stages(*arguments) == form.token_stages
                return form.token_stages

            patch.setattr(cuda_backend, "token_stages", checked_token_stages)
            patch.setattr(cuda_backend, "token_plan", checked_token_plan)
            patch.setattr(cuda_backend, "token_slices", checked_token_slices)

        yield choose


def missed(case: Case) -> str:
    return "\n".join(str(row) for row in check_case(case, "cuda") if not row.passed)


def _cases() -> dict[str, tuple[str, str, Case]]:
    """Return every dtype with every activation in each form; the schedules take turns."""
    cases = {}
    combinations = itertools.product(PAIRS, sorted(CudaBackend.activations))
    for index, ((form, dtype), activation) in enumerate(combinations):
        case = Case(dtype=dtype, activation=activation, **FORMS[form].sizes)
        schedule = SCHEDULES[index % len(SCHEDULES)]
        cases[f"{form}-{schedule}-{case}"] = form, schedule, case
    return cases


CASES = _cases()


@pytest.mark.sweep("form", lambda p: p["case"].dtype, lambda p: p["case"].activation, "schedule")
@pytest.mark.parametrize(("form", "schedule", "case"), CASES.values(), ids=CASES.keys())
def test_cuda_matches_float64_in_every_form(run_as, form, schedule, case):
    run_as(form, schedule)
    assert not missed(case)


OPTIONS = grid(CudaBackend.dtypes, ["gelu"], "default", small=True)


@pytest.mark.sweep("form", *fields_of("case", Case))
@pytest.mark.parametrize("form", ["row_block", "split"])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_cuda_matches_float64_with_every_option(kernels, monkeypatch, case, form):
    monkeypatch.setattr(kernels, "seed", OPTIONS.index(case) % len(SCHEDULES))
    with emulated(kernels, FORMS[form].device):
        assert not missed(case)


HALVES = [dtype for dtype in DTYPES if dtype.itemsize == 2]
# These sizes are whole vectors, which are copied unchanged.
WHOLE = Case(shape=(37,), hidden_size=456, bottleneck_size=24)
WHOLE_OPTIONS = options(WHOLE, HALVES, every_dtype=False) + [
    replace(WHOLE, dtype=dtype, scaling="channel", layout="rows", grad_layout="rows")
    for dtype in HALVES
]


@pytest.mark.sweep("form", *fields_of("case", Case))
@pytest.mark.parametrize(
    "form", ["row_block", "split", "cluster", "cluster_few", "resident", "resident_of_four"]
)
@pytest.mark.parametrize("case", WHOLE_OPTIONS, ids=str)
def test_cuda_matches_float64_with_every_option_in_whole_vectors(kernels, monkeypatch, case, form):
    monkeypatch.setattr(kernels, "seed", WHOLE_OPTIONS.index(case) % len(SCHEDULES))
    if form.startswith("cluster"):
        monkeypatch.setattr(cuda_backend, "token_plan", in_clusters)
    with emulated(kernels, FORMS[form].device):
        assert not missed(case)


def in_clusters(problem, device):
    plan = token_plan(problem, device)
    assert plan.num_clusters > 0
    return plan


@pytest.mark.sweep("dtype", "bottleneck")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("bottleneck", [1, 16, 17, 32, 33, 64, 65, 128, 129, 256])
def test_cuda_matches_float64_at_the_edges_of_every_tile(kernels, dtype, bottleneck):
    case = Case(
        dtype=dtype, shape=(131,), hidden_size=136, bottleneck_size=bottleneck, scaling="channel"
    )
    with emulated(kernels):
        assert not missed(case)


@pytest.mark.sweep("form", "bottleneck", "skip")
@pytest.mark.parametrize("form", ["row_block_large", "split_large"])
@pytest.mark.parametrize("bottleneck", [33, 64, 65, 128])
@pytest.mark.parametrize("skip", [False, True])
def test_cuda_large_tiles_match_float64_at_their_edges(kernels, form, bottleneck, skip):
    """Whole vectors, five stages or fewer of them, and what is added as one tile or two."""
    case = Case(
        dtype=torch.bfloat16, shape=(131,), hidden_size=456, bottleneck_size=bottleneck,
        scaling="channel", skip=skip,
    )  # fmt: skip
    with emulated(kernels, FORMS[form].device):
        assert not missed(case)


@pytest.mark.thorough
@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("bottleneck", [1, 16, 17, 32, 33, 64, 65, 128])
def test_cuda_cluster_matches_float64_at_the_edges_of_every_tile(
    kernels, monkeypatch, tokens, bottleneck
):
    """The last of the eight blocks has no features, and the one before it nine."""
    case = Case(
        dtype=torch.bfloat16, shape=(70,), hidden_size=777, bottleneck_size=bottleneck,
        scaling="channel",
    )  # fmt: skip
    plan = TokenPlan(Slices(8, 128), num_clusters=1, cluster_tokens=tokens)
    monkeypatch.setattr(cuda_backend, "token_plan", lambda *_: plan)
    with emulated(kernels):
        assert not missed(case)


@pytest.mark.sweep("dtype")
@each_form_and_dtype
def test_cuda_gives_the_same_bits_in_every_schedule(run_as, kernels, monkeypatch, form, dtype):
    case = Case(dtype=dtype, scaling=FORMS[form].scaling, skip=True, **FORMS[form].sizes)
    run_as(form)
    assert differing_bits(case, "cuda") == []
    tensors = case.draw("cpu", seed=0)
    call = case.make_call(tensors)
    results = []
    for seed in cuda_emulator.SCHEDULES.values():
        monkeypatch.setattr(kernels, "seed", seed)
        outputs, saved = get("cuda").forward(call, save=True)
        gradients = get("cuda").backward(call, saved, Outputs(tensors["x"]), ALL)
        results.append(filter(torch.is_tensor, (*outputs, *saved, *gradients)))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.sweep("form", "dtype")
@each_form_and_dtype
def test_cuda_zero_up_projection_returns_the_residual_bit_for_bit(run_as, form, dtype):
    run_as(form)
    case = Case(dtype=dtype, bias="down", activation="sigmoid", **FORMS[form].sizes)
    tensors = case.draw("cpu", seed=0)
    tensors["up_weight"].zero_()
    y = get("cuda").forward(case.make_call(tensors), save=False)[0].y
    assert torch.equal(y, tensors["x"])


@pytest.mark.parametrize("form", ["row_block", "split", "cluster", "cluster_few"])
def test_cuda_float32_residual_stream_is_not_rounded(kernels, form):
    """Beside half-precision products, a float32 x itself is added, not its rounded tile."""
    case = replace(WHOLE, dtype=torch.float32, autocast=torch.bfloat16, bias="down")
    tensors = case.draw("cpu", seed=0)
    tensors["up_weight"].zero_()
    with emulated(kernels, FORMS[form].device):
        y = get("cuda").forward(case.make_call(tensors), save=False)[0].y
    assert torch.equal(y, tensors["x"])


@pytest.mark.sweep("form", "dtype")
@each_form_and_dtype
def test_cuda_nan_stays_in_its_row(run_as, form, dtype):
    """A NaN in x makes its token NaN, as in eager, and no other: with relu too."""
    run_as(form)
    case = Case(dtype=dtype, activation="relu", residual="none", **FORMS[form].sizes)
    tensors = case.draw("cpu", seed=0)
    tensors["x"][3, 5] = torch.nan
    y = get("cuda").forward(case.make_call(tensors), save=False)[0].y
    rows = y.isnan().any(1)
    assert y[3].isnan().all()
    assert rows.sum() == 1


@pytest.mark.sweep("form", "dtype", "activation")
@each_form_and_dtype
@pytest.mark.parametrize(
    ("activation", "bottleneck"), [("tanh", None), ("sigmoid", 3), ("relu", None)]
)
def test_cuda_has_inf_and_nan_where_eager_has_them(
    kernels, monkeypatch, form, dtype, activation, bottleneck
):
    """Inf in a token makes act(z) 1 or 0 in the units that are there, and must not become NaN in
    those that only fill up the tile. With few units, gradients are Inf as often as NaN."""
    case = Case(dtype=dtype, activation=activation, nonfinite=True, **FORMS[form].sizes)
    case = replace(case, shape=(max(13, *case.shape),))  # some tokens stay finite
    if FORMS[form].cluster_tokens:
        monkeypatch.setattr(cuda_backend, "token_plan", in_clusters)
    with emulated(kernels, FORMS[form].device):
        assert not missed(replace(case, bottleneck_size=bottleneck or case.bottleneck_size))


@pytest.mark.sweep("dtype", "activation")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda_gradients_of_special_values_are_autograds(run_as, activation, dtype):
    run_as("row_block")
    assert_gradient_is_autograds(get("cuda"), activation, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("form", FORMS)
def test_cuda_computes_only_the_gradients_asked_for(run_as, form):
    """In every subset the gradients asked for equal the full set's, and the others are absent."""
    run_as(form)
    case = Case(dtype=torch.bfloat16, scaling=FORMS[form].scaling, **FORMS[form].sizes)
    tensors = case.draw("cpu", seed=0)
    call = case.make_call(tensors)
    _, saved = get("cuda").forward(call, save=True)
    upstream = Outputs(tensors["x"])
    full = get("cuda").backward(call, saved, upstream, ALL)
    assert full.residual is full.skip is upstream.y
    for subset in itertools.product([False, True], repeat=6):
        if sum(subset) not in (1, 5) and form != "row_block":
            continue
        needs = Needs(*subset[:5], scaling=subset[5])
        kept = saved if needs.z else Saved(None)
        some = get("cuda").backward(call.for_backward(needs), kept, upstream, needs)
        for wanted, a, b in zip(needs, full, some, strict=True):
            assert torch.equal(a, b) if wanted else b is None


@pytest.mark.parametrize("form", [name for name in FORMS if FORMS[name].takes(torch.float32)])
def test_cuda_runs_float32_in_tf32_where_torch_allows_it(run_as, form):
    """TF32 rounds the operands of products, and nothing else."""
    run_as(form)
    case = Case(tf32=True, scaling="channel", skip=True, **FORMS[form].sizes)
    assert not missed(case)
    for row in check_case(case, "cuda"):
        sums_only = row.tensor in ("d_up_bias", "d_skip")
        assert row.error < 1e-6 if sums_only else row.error > 1e-5, row
    assert differing_bits(case, "cuda") == []


def test_cuda_forms_agree_on_the_same_call(kernels):
    """The same products, summed in another order, agree to one rounding of the output."""
    case = Case(dtype=torch.float32, shape=(70,), hidden_size=530, bottleneck_size=48)
    call = case.make_call(case.draw("cpu", seed=0))
    results = []
    for num_sms in (1, 64):
        with emulated(kernels, Device(num_sms)):
            outputs, saved = get("cuda").forward(call, save=True)
            results.append((outputs.y, saved.z))
    for row_block, split in zip(*results, strict=True):
        assert 0 < metric(split, row_block) < 1e-6


def test_cuda_offsets_pass_two_to_the_31(kernels):
    """Rows so far apart that an offset of 32 bits would wrap; only the pages in use exist."""
    stride, tokens = 2**30 + 8, 4
    # numpy allocates it: torch would fill it with NaN here, which would use 8 GB of pages.
    pages = torch.from_numpy(np.empty(tokens * stride, dtype=np.int16)).view(torch.bfloat16)
    spread = pages.as_strided((tokens, 24), (stride, 1))
    case = Case(dtype=torch.bfloat16, shape=(tokens,), hidden_size=24, bottleneck_size=8)
    tensors = case.draw("cpu", seed=0)
    spread.copy_(tensors["x"])
    with emulated(kernels):
        near, _ = get("cuda").forward(case.make_call(tensors), save=False)
        far, _ = get("cuda").forward(case.make_call({**tensors, "x": spread}), save=False)
    assert torch.equal(near.y, far.y)


def test_cuda_declines_what_does_not_stay_on_chip(kernels):
    case = Case(shape=(3,), hidden_size=8, bottleneck_size=257)
    with emulated(kernels):
        reasons = get("cuda").unsupported_reasons(case.make_call(case.draw("cpu", seed=0)).spec())
    assert reasons == ["bottleneck_size 257 exceeds 256, the widest that stays on chip"]


@pytest.mark.parametrize("kind", [ForwardParams, BackwardParams])
@pytest.mark.parametrize("number", [-1, len(ACTIVATIONS), 2**32])
def test_launchers_refuse_an_activation_without_a_formula(kernels, kind, number):
    """Known numbers get further: a forward without tokens to its grid, a backward to the end."""
    is_forward = kind is ForwardParams
    launch = kernels.forward if is_forward else kernels.backward
    empty = {name: NOTHING if kind.__annotations__[name] is View else 0 for name in kind._fields}
    with pytest.raises(RuntimeError, match="an invalid value"):
        launch(kind(**{**empty, "activation": number}).pack(), 0, 0)
    grid_error = pytest.raises(RuntimeError, match="launch: grid 0")
    for known in ACTIVATIONS.values():
        with grid_error if is_forward else contextlib.nullcontext():
            launch(kind(**{**empty, "activation": known}).pack(), 0, 0)
