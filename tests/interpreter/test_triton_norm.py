"""The norm behind an adapter in every form of the Triton kernels, against float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from forms import FORMS

from adapterkern import reference
from adapterkern.backends import get
from adapterkern.backends.triton import backend as triton_backend
from adapterkern.backends.triton import norm_launches
from adapterkern.parity import judge, metric
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.spec import TENSOR_NAMES, make_call, with_norm

pytestmark = pytest.mark.interpreter
triton = get("triton")
HALF, SINGLE = torch.bfloat16, torch.float32
ALL = Needs(*[True] * len(Needs._fields))
# One program takes two row blocks, two take three; a kernel of its own normalises what L2 would not
# keep, and the sums of the split forms.
SIZES = {
    "row_block": (70, 70, 20),
    "two_programs": (137, 70, 20),
    "rows": (70, 70, 20),
    "split": (37, 70, 20),
    "split_features": (5, 530, 20),
    "split_wide": (9, 75, 150),
}


@pytest.fixture
def run_norm_as(run_as, monkeypatch):
    """run_norm_as(name): from here on every call takes that form; returns its sizes."""
    fused = []
    for name in ("forward_norm_row_block", "dx_norm_row_block"):
        launch = getattr(norm_launches.NormLaunches, name)
        monkeypatch.setattr(
            norm_launches.NormLaunches,
            name,
            lambda *arguments, launch=launch: fused.append(1) or launch(*arguments),
        )

    def choose(name):
        if name == "two_programs":
            monkeypatch.setitem(FORMS, name, replace(FORMS["row_block"], num_sms=2))
        run_as("row_block" if name == "rows" else name)
        if name == "rows":
            device = replace(triton_backend.cpu_device, l2=1)
            monkeypatch.setattr(triton_backend, "cpu_device", device)
        return SIZES[name]

    yield choose
    in_one = triton_backend.cpu_device.num_sms <= 2 and triton_backend.cpu_device.l2 > 1
    assert not fused or in_one


def drawn(sizes, dtype=HALF, *, norm="layer", of_norm=None, added=None, seed=0, **options):
    """A call with every tensor but those that `absent` names, all of one dtype but for those of the
    norm and those that are added, and its upstream gradients."""
    tokens, hidden, bottleneck = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype, mean=0.0):
        return (torch.randn(*shape, generator=generator) + mean).to(dtype)

    absent, strided = options.pop("absent", ()), options.pop("strided", False)
    scaling, activation = options.pop("scaling", "channel"), options.pop("activation", "gelu")
    prenorm, far = options.pop("prenorm", True), options.pop("far", 0.0)
    residual = options.pop("residual", "input")
    rows = (tokens, 2 * hidden + 5) if strided else (tokens, hidden)

    def row(**given):
        return normal(*rows, **given)[:, :hidden]

    given = {
        "x": row(),
        "down_weight": normal(bottleneck, hidden) * hidden**-0.5,
        "up_weight": normal(hidden, bottleneck) * bottleneck**-0.5,
        "down_bias": normal(bottleneck),
        "up_bias": normal(hidden),
        "skip": row(dtype=added or dtype, mean=far),
    }
    given = {name: None if name in absent else tensor for name, tensor in given.items()}
    learned = {"channel": normal(hidden), "single": normal(1)}
    call = make_call(
        **given,
        residual=row(dtype=added or dtype) if residual == "tensor" else residual,
        scaling=learned.get(scaling, scaling),
        activation=activation,
    )
    weight, bias = (
        None if name in absent else normal(hidden, dtype=of_norm or dtype)
        for name in ("norm_weight", "norm_bias")
    )
    settings = {"eps": 1e-5, "weight_offset": 0.0, "cast_before_weight": False} | options
    call = with_norm(call, weight, bias, norm, prenorm=prenorm, **settings)
    d_normed, d_stream = row(dtype=call.normed_dtype), row(dtype=call.output_dtype)
    return call, Outputs(d_stream if prenorm else None, d_normed)


def by_autograd(call, upstream, wide=False):
    """Every result of the plain composition; wide: in float64."""

    def leaf(tensor):
        tensor = tensor.detach().contiguous()
        return (tensor.double() if wide else tensor.clone()).requires_grad_()

    leaves = {name: leaf(t) for name, t in call.tensors().items() if t is not None}
    changed = {"compute_dtype": torch.float64} if wide else {}
    outputs = reference.forward(call._replace(**leaves, **changed))[0]
    pairs = [(o, d) for o, d in zip(outputs, upstream, strict=True) if d is not None]
    upstreams = [d.double() if wide else d for _, d in pairs]
    gradients = torch.autograd.grad([o for o, _ in pairs], [*leaves.values()], upstreams)
    found = {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"y": outputs.y.detach(), "y normed": outputs.normed.detach(), **found}


def by_triton(call, upstream, needs=ALL):
    """The same of the kernels; `y alone` of the forward that saves nothing."""
    alone = triton.forward(call, save=False)[0]
    assert (alone.y is None) == (not call.prenorm)
    outputs, saved = triton.forward(call, save=True)
    needs = Needs(*[n and t is not None for n, t in zip(needs, call, strict=False)])
    gradients = gradients_of(call, outputs, saved, upstream, needs)
    found = {
        "y": outputs.y,
        "y normed": outputs.normed,
        "y alone": alone.normed,
        **{f"d_{name}": g for name, g in gradients._asdict().items() if g is not None},
    }
    if call.prenorm:
        found["y of the stream alone"] = alone.y
    return found, saved


def gradients_of(call, outputs, saved, upstream, needs):
    """Of no more than they need, as autograd keeps it."""
    saved = Saved(
        saved.z if needs.z else None,
        *((saved.mean, saved.rstd, outputs.y) if needs.stream else ()),
    )
    return triton.backward(call.for_backward(needs), saved, upstream, needs)


def missed(call, upstream):
    found, _ = by_triton(call, upstream)
    oracle, eager = by_autograd(call, upstream, wide=True), by_autograd(call, upstream)
    twins = {"y alone": "y normed", "y of the stream alone": "y"}
    assert {twins.get(name, name) for name in found} == {*oracle}
    missed = []
    for name, out in found.items():
        twin = twins.get(name, name)
        # Autograd converts what the kernels leave in the dtype of the stream.
        added = name in ("d_residual", "d_skip")
        assert out.dtype == (call.output_dtype if added else eager[twin].dtype), name
        error, tolerance = judge(name, out, oracle[twin], [eager[twin]], eager[twin].dtype)
        if not error <= tolerance:
            missed.append(f"{name}: {error:.2e} of {tolerance:.2e}")
    for name, twin in twins.items():
        if name in found and not torch.equal(found[name], found[twin]):
            missed.append(f"{name} differs from {twin}")
    return missed


KINDS = [
    *((form, "layer", HALF) for form in SIZES),
    ("row_block", "rms", torch.float16),
    ("row_block", "layer", SINGLE),
    ("rows", "rms", SINGLE),
    ("split", "layer", torch.float16),
]


@pytest.mark.sweep("form", "norm", "dtype")
@pytest.mark.parametrize(("form", "norm", "dtype"), KINDS, ids=lambda kind: str(kind))
def test_triton_norm_matches_float64_in_every_form(run_norm_as, form, norm, dtype):
    sizes = run_norm_as(form)
    prenorm = norm == "layer"
    assert not missed(*drawn(sizes, dtype, norm=norm, prenorm=prenorm))


OPTIONS = {
    "offset": {"weight_offset": 1.0, "norm": "rms", "absent": ("norm_bias",)},
    "cast": {"cast_before_weight": True, "of_norm": SINGLE},
    "cast-and-offset": {"cast_before_weight": True, "weight_offset": 1.0, "norm": "rms"},
    "no-parameters": {"absent": ("norm_weight", "norm_bias"), "eps": 0.5},
    "no-weight": {"absent": ("norm_weight", "down_bias", "up_bias"), "prenorm": False},
    "no-skip": {"absent": ("skip",), "of_norm": SINGLE, "prenorm": False},
    "nothing-added": {"residual": None, "absent": ("skip",), "activation": "relu"},
    "strided": {"strided": True, "residual": "tensor", "scaling": "single"},
    "float32-stream": {"added": SINGLE, "scaling": 0.5},
}


@pytest.mark.sweep
@pytest.mark.parametrize("form", ["rows", "row_block"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_triton_norm_matches_float64_with_every_option(run_norm_as, form, options):
    assert not missed(*drawn(run_norm_as(form), **options))


@pytest.mark.thorough
def test_triton_norm_matches_float64_in_tf32(run_norm_as):
    before = torch.get_float32_matmul_precision()
    sizes = run_norm_as("row_block")
    torch.set_float32_matmul_precision("high")  # the interpreter's products are exact all the same
    try:
        assert not missed(*drawn(sizes, SINGLE))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("tokens", "hidden", "bottleneck"),
    [(1, 70, 20), (37, 64, 16), (37, 1, 1), (2, 257, 5), (66, 130, 33)],
)
@pytest.mark.parametrize("num_sms", [1, 10**3])
def test_triton_norm_matches_float64_at_ragged_sizes(
    monkeypatch, num_sms, tokens, hidden, bottleneck
):
    device = replace(triton_backend.cpu_device, num_sms=num_sms)
    monkeypatch.setattr(triton_backend, "cpu_device", device)
    # One feature is its own mean: what is left of it is rounding.
    norm = "rms" if hidden == 1 else "layer"
    assert not missed(*drawn((tokens, hidden, bottleneck), SINGLE, norm=norm, eps=1e-2))


@pytest.mark.parametrize("needs", [ALL, ALL._replace(x=False)], ids=["all", "without-x"])
def test_triton_norm_of_no_tokens_is_empty(needs):
    call, upstream = drawn((0, 64, 16))
    found, saved = by_triton(call, upstream, needs)
    assert found["y normed"].shape == found["y"].shape == (0, 64)
    assert saved.mean.shape == saved.rstd.shape == (0,)
    for name in ("d_norm_weight", "d_norm_bias", "d_up_weight", "d_scaling"):
        assert not found[name].any()


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["rows", "row_block"])
def test_triton_norm_of_rows_far_from_zero_cancels_nothing(run_norm_as, form):
    """A mean of a thousand standard deviations: the mean of the squares, less the square of the
    mean, would be wrong by a tenth."""
    call, upstream = drawn(run_norm_as(form), SINGLE, far=1e3)
    assert not missed(call, upstream)
    _, saved = by_triton(call, upstream)
    wide = {n: t.double() for n, t in call.tensors().items() if t is not None}
    y = reference.forward(call._replace(**wide, compute_dtype=torch.float64))[0].y
    assert metric(saved.mean, y.mean(-1)) < 1e-6
    assert metric(saved.rstd, 1 / (y.var(-1, correction=0) + call.eps).sqrt()) < 3e-5


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["rows", "row_block"])
def test_triton_norm_rounds_before_the_weight_where_asked_to(run_norm_as, form):
    """Of float32 parameters the outcome shows it, which the rounding of the results would hide."""
    for cast in (False, True):
        call, upstream = drawn(run_norm_as(form), of_norm=SINGLE, cast_before_weight=cast)
        found, saved = by_triton(call, upstream)
        xhat = (found["y"].float() - saved.mean[:, None]) * saved.rstd[:, None]
        for rounds in (False, True):
            factor = xhat.bfloat16().float() if rounds else xhat
            normed = factor * call.norm_weight + call.norm_bias
            d_weight = (upstream.normed * factor).sum(0)
            errors = metric(found["y normed"], normed), metric(found["d_norm_weight"], d_weight)
            assert max(errors) < 1e-6 if rounds == cast else min(errors) > 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["rows", "two_programs"])
def test_triton_norm_repeats_bit_for_bit(run_norm_as, form):
    call, upstream = drawn(run_norm_as(form))
    first, second = (by_triton(call, upstream)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", ["rows", "row_block"])
def test_triton_norm_nan_stays_in_its_row(run_norm_as, form):
    call, upstream = drawn(run_norm_as(form))
    call.x[3, 5] = torch.nan
    found, _ = by_triton(call, upstream)
    for name in ("y normed", "y alone", "d_skip", "d_x"):
        assert found[name][3].isnan().all()
        assert found[name].isnan().any(1).sum() == 1, name


def subsets():
    """Every tensor alone, everything but each of some, and one of the norm with one beside it."""
    alone = [(name,) for name in TENSOR_NAMES]
    few = ("x", "norm_weight", "norm_bias")
    others = [tuple(n for n in TENSOR_NAMES if n != name) for name in few]
    pairs = itertools.product(("norm_weight", "norm_bias"), ("up_weight", "up_bias", "skip"))
    return [*alone, *others, *pairs]


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["rows", "row_block"])
def test_triton_norm_computes_only_the_gradients_asked_for(run_norm_as, form):
    """Those asked for equal the full set's, the others are absent; the call has no value that they
    do not need."""
    run_norm_as(form)
    call, upstream = drawn((37, 40, 12), SINGLE, residual="tensor")
    outputs, saved = triton.forward(call, save=True)
    full = gradients_of(call, outputs, saved, upstream, ALL)
    for names in subsets():
        needs = Needs(**dict.fromkeys(names, True))
        found = gradients_of(call, outputs, saved, upstream, needs)
        assert {name for name, g in found._asdict().items() if g is not None} == {*names}
        for name in names:
            error = metric(getattr(found, name), getattr(full, name))
            assert error < 3e-7, (names, name)


def test_triton_norm_gradients_of_residual_and_skip_are_one_tensor(run_norm_as):
    call, upstream = drawn(run_norm_as("row_block"), residual="tensor")
    found, _ = by_triton(call, upstream)
    assert found["d_residual"] is found["d_skip"]
    assert found["d_skip"].data_ptr() != upstream.y.data_ptr()
