"""The norm behind the output in the CUDA kernels, forward and backward."""

import contextlib
import itertools
from dataclasses import replace

import cuda_emulator
import pytest
import torch
from cuda_norms import CLUSTERS, NormCase, all_needs, missed, plan, results_of
from emulated import emulated
from thorough import fields_of

from adapterkern import bottleneck_adapter_norm
from adapterkern.backends import get
from adapterkern.backends.base import NORM_FEATURES
from adapterkern.backends.cuda import norm as cuda_norm
from adapterkern.backends.cuda.facts import Device
from adapterkern.parity import Case, check_case, grid, refusals
from adapterkern.results import Needs, Saved

HALF = torch.float16
# Blocks of a cluster, tokens at a time, tokens, features, units, clusters. One cluster walks over
# three tiles; the last blocks of others have no features, or one vector of them.
SHAPES = {
    "2 of 64": (2, 64, 150, 264, 20, 1),
    "4 of 16": (4, 16, 37, 520, 33, 1),
    "8 of 64": (8, 64, 70, 392, 16, 1),
    "8 of 16": (8, 16, 37, 776, 128, 2),
    "narrow": (2, 16, 3, 8, 1, 1),
}
OPTIONS = {
    "layer": NormCase(),
    "rms": NormCase(norm="rms", bias=False),
    "float16": NormCase(HALF, d_stream=False),
    "float32 parameters": NormCase(parameters=torch.float32, mean=20.0),
    "no parameters": NormCase(HALF, weight=False, bias=False, residual="none"),
    "gemma": NormCase(norm="rms", offset=1.0, bias=False, parameters=torch.float32),
    "llama": NormCase(HALF, norm="rms", cast=True, scaling="channel"),
    "gaps": NormCase(residual="tensor", gaps=True, scaling="channel", d_stream=True),
    "wide input": NormCase(residual="tensor", skip=False, wide_input=True),
    "mean": NormCase(mean=100.0, bias=False),
    "not prenorm": NormCase(prenorm=False, d_stream=False, cast=True, offset=0.5),
}


@pytest.fixture
def run_as(kernels, monkeypatch):
    """run_as(shape, case, schedule): the case in its sizes, planned as that shape."""
    with contextlib.ExitStack() as stack:

        def choose(shape: str, case: NormCase, schedule: str = "round_robin") -> NormCase:
            size, at_once, tokens, hidden, bottleneck, number = SHAPES[shape]
            stack.enter_context(emulated(kernels, CLUSTERS))
            fixed = plan(size, at_once, hidden, number)
            monkeypatch.setattr(cuda_norm, "norm_plan", lambda *_: fixed)
            monkeypatch.setattr(kernels, "seed", cuda_emulator.SCHEDULES[schedule])
            return replace(case, tokens=tokens, hidden=hidden, bottleneck=bottleneck)

        yield choose


PAIRS = [
    (shape, option)
    for (i, shape), (j, option) in itertools.product(enumerate(SHAPES), enumerate(OPTIONS))
    if (i + j) % 2 == 0
]


@pytest.mark.sweep("shape", "options")
@pytest.mark.parametrize(("shape", "options"), PAIRS)
def test_cuda_norm_matches_float64(run_as, shape, options):
    schedule = list(cuda_emulator.SCHEDULES)[PAIRS.index((shape, options)) % 3]
    assert missed(run_as(shape, OPTIONS[options], schedule)) == []


def _grid() -> list[Case]:
    """Every option that `adapterkern check` tries with a norm, at widths that clusters take."""
    cases = grid([torch.bfloat16, HALF], ["gelu"], small=True, features=NORM_FEATURES)
    width = {33: 40, 70: 264, 75: 136, 530: 520}
    return [
        replace(
            case,
            hidden_size=width[case.hidden_size],
            bottleneck_size=min(case.bottleneck_size, 128),
        )
        for case in cases
        if case.norm != "none"
    ]


GRID = _grid()


@pytest.mark.sweep(*fields_of("case", Case))
@pytest.mark.parametrize("case", GRID, ids=str)
def test_cuda_norm_matches_float64_with_every_option(kernels, monkeypatch, case):
    """A sum in float32, of a residual or an input in it, is declined."""
    monkeypatch.setattr(kernels, "seed", GRID.index(case) % 3)
    wide = torch.float32 in (case.dtype, case.residual_dtype)
    with emulated(kernels, CLUSTERS):
        reasons = refusals(case, "cuda")
        assert len(reasons) == wide
        assert wide or [str(row) for row in check_case(case, "cuda") if not row.passed] == []


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("shape", ["2 of 64", "8 of 16"])
def test_cuda_norm_returns_what_is_asked_for(run_as, shape, prenorm):
    """Without a backward the stream is not written, and nothing is saved: the bits are the same."""
    case = run_as(shape, replace(OPTIONS["float32 parameters"], prenorm=prenorm))
    call, _ = case.draw()
    kept, _ = get("cuda").forward(call, save=True)
    outputs, saved = get("cuda").forward(call, save=False)
    assert torch.equal(outputs.normed, kept.normed)
    assert torch.equal(outputs.y, kept.y) if prenorm else outputs.y is None
    assert saved == Saved(None)


@pytest.mark.sweep("norm", "shape")
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_norm_takes_its_statistics_from_the_sum_before_it_is_rounded(run_as, shape, norm):
    """Of a sum with a mean of hundreds of times its deviation, of which a difference of the mean of
    the squares and the square of the mean would have one digit left."""
    case = run_as(shape, NormCase(norm=norm, mean=1000.0, scaling="channel"))
    call, _ = case.draw()
    call.up_weight.zero_()
    call.up_bias.zero_()
    _, saved = get("cuda").forward(call, save=True)
    exact = call.x.double() + call.skip.double()
    mean = exact.mean(1) if norm == "layer" else torch.zeros(())
    rstd = ((exact - mean.unsqueeze(-1)).square().mean(1) + 1e-5).rsqrt()
    torch.testing.assert_close(saved.rstd.double(), rstd, rtol=2e-5, atol=0)
    if norm == "layer":
        torch.testing.assert_close(saved.mean.double(), mean, rtol=2e-7, atol=0)
    else:
        assert saved.mean is None


def test_cuda_norm_gives_the_same_bits_in_every_run_and_schedule(run_as, kernels, monkeypatch):
    """The third call of a kind repeats the launches of the second."""
    case = run_as("8 of 16", OPTIONS["float32 parameters"])
    call, upstream = case.draw()
    first, *others = (
        results_of(get("cuda"), call, upstream)
        for seed in (*cuda_emulator.SCHEDULES.values(), 0)
        if monkeypatch.setattr(kernels, "seed", seed) is None
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_cuda_norm_keeps_nan_in_its_row(run_as):
    case = run_as("4 of 16", OPTIONS["layer"])
    call, _ = case.draw()
    call.x[3, 5] = torch.nan
    normed = get("cuda").forward(call, save=False)[0].normed
    assert normed[3].isnan().all()
    assert normed.isnan().any(1).sum() == 1


SUBSETS = {
    "norm's bias": ("norm_bias",),
    "norm's weight": ("norm_weight",),
    "norm": ("norm_weight", "norm_bias"),
    "residual and skip": ("residual", "skip"),
    "x": ("x",),
    "up bias": ("up_bias",),
    "adapter": ("down_weight", "up_weight", "down_bias", "up_bias"),
    "frozen adapter": ("x", "residual", "norm_weight"),
}


@pytest.mark.parametrize("names", SUBSETS.values(), ids=SUBSETS)
def test_cuda_norm_computes_only_the_gradients_asked_for(run_as, names):
    case = run_as("2 of 64", OPTIONS["gaps"])
    call, upstream = case.draw()
    outputs, saved = get("cuda").forward(call, save=True)
    saved = saved._replace(stream=outputs.y)
    full = get("cuda").backward(call, saved, upstream, all_needs(call))
    assert full.residual is full.skip
    needs = Needs(**dict.fromkeys(names, True))
    kept = saved if needs.stream else Saved(None)
    kept = kept if needs.z else kept._replace(z=None)
    some = get("cuda").backward(call.for_backward(needs), kept, upstream, needs)
    for wanted, a, b in zip(needs, full, some, strict=True):
        assert torch.equal(a, b) if wanted else b is None


@pytest.mark.parametrize("used", ["normed", "stream", "both"])
def test_cuda_norm_is_differentiable(kernels, used):
    """Through the public function, at any number of tokens, against the same on the reference."""
    call, upstream = NormCase(residual="tensor", tokens=5, hidden=264).draw()
    leaves = {n: t for n, t in call.tensors().items() if t is not None}
    results = []
    for backend in ("cuda", "reference"):
        inputs = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
        with emulated(kernels, CLUSTERS):
            normed, stream = bottleneck_adapter_norm(
                **inputs, scaling=0.7, prenorm=True, backend=backend
            )
            both = ((normed, upstream.normed), (stream, upstream.y))
            pairs = [p for p, name in zip(both, ("normed", "stream"), strict=True)
                     if used in (name, "both")]  # fmt: skip
            torch.autograd.backward(*zip(*pairs, strict=True))
        results.append({n: t.grad for n, t in inputs.items()})
    ours, theirs = results
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None
        else:
            error = (ours[name].double() - gradient.double()).norm() / gradient.double().norm()
            assert error < 0.02, name


def test_cuda_norm_of_no_tokens(kernels):
    call, upstream = NormCase(tokens=0).draw()
    with emulated(kernels, CLUSTERS):
        found = results_of(get("cuda"), call, upstream)
    assert found["normed"].shape == found["d_x"].shape == (0, 264)
    assert not found["d_norm_weight"].any()


DECLINED = {
    "float32": (NormCase(torch.float32), CLUSTERS, "a norm behind products in float32 is not"),
    "stream": (replace(NormCase(), wide_input=True), CLUSTERS, "a norm of a sum in float32 is not"),
    "odd": (NormCase(hidden=260), CLUSTERS, "needs hidden_size in multiples of 8, this is 260"),
    "wide": (NormCase(hidden=6152), CLUSTERS, "hidden_size 6152 exceeds 6144, the widest row"),
    "no clusters": (NormCase(), Device(1), "needs clusters of blocks, which this device"),
    "none placed": (
        NormCase(),
        replace(CLUSTERS, cluster_sizes=()),
        "needs clusters of blocks, which this device",
    ),
    "bottleneck": (NormCase(bottleneck=129), CLUSTERS, "bottleneck_size 129 exceeds 128, the wide"),
    "memory": (
        NormCase(hidden=4096, bottleneck=128),
        CLUSTERS,
        "needs 359680 bytes of shared memory in each of 8 blocks, this device has 232448",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "device", "reason"), DECLINED.values(), ids=DECLINED)
def test_cuda_declines_a_norm_with_its_reason(kernels, case, device, reason):
    call, _ = case.draw()
    with emulated(kernels, device):
        reasons = get("cuda").unsupported_reasons(call.spec())
        assert not get("cuda").unsupported_reasons(call.without_norm().spec())
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_cuda_norm_without_clusters_in_the_plan_is_refused(kernels):
    call, _ = NormCase().draw()
    with emulated(kernels, CLUSTERS), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_norm, "norm_plan", lambda *_: plan(2, 64, 264, number=0))
        with pytest.raises(RuntimeError, match="an invalid value"):
            get("cuda").forward(call, save=False)
