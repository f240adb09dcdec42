"""adapterkern.reference with a norm: its hand-written backward against autograd and formulas."""

import itertools

import pytest
import torch
from eager import eager_adapter, tensors

import adapterkern as ak
from adapterkern import norm, reference
from adapterkern.results import Needs, Outputs
from adapterkern.spec import TENSOR_NAMES, make_call, with_norm

SETTINGS = {
    "layer": {"norm": "layer"},
    "layer-bare": {"norm": "layer", "eps": 0.5, "affine": False},
    "layer-offset-cast": {"norm": "layer", "weight_offset": 1.0, "cast_before_weight": True},
    "rms": {"norm": "rms"},
    "rms-bare": {"norm": "rms", "eps": 0.5, "affine": False},
    "rms-offset": {"norm": "rms", "weight_offset": 1.0},
    "rms-cast": {"norm": "rms", "cast_before_weight": True},
}
IN_FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def written_out(y, weight, bias, *, norm, eps=1e-5, weight_offset=0.0, **_):
    """The norm as its papers have it; without rounding, a cast is nothing."""
    centered = y - y.mean(-1, keepdim=True) if norm == "layer" else y
    normed = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        normed = normed * (weight + weight_offset)
    return normed if bias is None else normed + bias


def arguments_of(settings, shape=(3, 5), **options):
    """The tensors of a call with this norm, and the settings of the norm itself."""
    options = {"residual": True, "skip": True, "norm": settings.get("affine", True)} | options
    settings = {name: value for name, value in settings.items() if name != "affine"}
    return tensors(shape, **options), settings


def fused(arguments, **settings):
    arguments = {"norm_weight": None, **arguments}
    return ak.bottleneck_adapter_norm(**arguments, **settings, backend="reference")


def composed(arguments, **settings):
    of_norm = [arguments.get(name) for name in ("norm_weight", "norm_bias")]
    adapter = {name: t for name, t in arguments.items() if not name.startswith("norm_")}
    stream = eager_adapter(**adapter)
    return written_out(stream, *of_norm, **settings), stream


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("upstream", ["normed", "stream", "both"])
def test_outputs_and_gradients_are_those_of_the_formula(settings, upstream):
    arguments, settings = arguments_of(settings, scaling=10)
    given = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    chosen = {"normed": [0], "stream": [1], "both": [0, 1]}[upstream]
    results = []
    for outputs in (fused(arguments, **settings, prenorm=True), composed(arguments, **settings)):
        found = torch.autograd.grad(
            [outputs[index] for index in chosen],
            list(arguments.values()),
            [given[index] for index in chosen],
            allow_unused=True,
        )
        results.append([*outputs, *found])
    for name, found, expected in zip(["normed", "stream", *arguments], *results, strict=True):
        torch.testing.assert_close(found, expected, **IN_FLOAT64, msg=lambda m, n=name: f"{n}: {m}")
    alone = fused(arguments, **settings)
    torch.testing.assert_close(alone, results[0][0], rtol=0, atol=0)


@pytest.mark.sweep("prenorm", "settings")
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_function_passes_gradcheck_and_gradgradcheck(settings, prenorm):
    """First derivatives by the hand-written backward, second ones by autograd's."""
    arguments, settings = arguments_of(settings, (2,), hidden=5, bottleneck=3, residual=False)

    def function(*values):
        return fused(dict(zip(arguments, values, strict=True)), **settings, prenorm=prenorm)

    values = tuple(arguments.values())
    assert torch.autograd.gradcheck(function, values, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("of_stream", [False, True], ids=["normed", "normed and stream"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_backward_computes_exactly_what_is_needed(kind, of_stream):
    """Every subset, and without the saved values that it does not need."""
    arguments, _ = arguments_of({}, scaling=10, residual=False)
    given = {name: t.detach() for name, t in arguments.items()}
    of_norm = [given.pop(name) for name in ("norm_weight", "norm_bias")]
    call = with_norm(make_call(**given), *of_norm, kind, 1e-5, 0.0, False, of_stream)
    (y, _), saved = reference.forward_of_values(call)
    saved = saved._replace(z=saved.z.reshape(-1, call.bottleneck_size), stream=y)
    normed, stream = torch.randn(2, 3, 5, 10, dtype=torch.float64)
    upstream = Outputs(stream if of_stream else None, normed)

    def gradients(needs):
        kept = saved._replace(z=saved.z if needs.z else None)
        if not needs.stream:
            kept = kept._replace(stream=None, mean=None, rstd=None)
        found = reference.backward(call.for_backward(needs), kept, upstream, needs)
        return {name: g for name, g in found._asdict().items() if g is not None}

    names = [name for name in TENSOR_NAMES if name in arguments]
    everything = gradients(Needs(**dict.fromkeys(names, True)))
    assert list(everything) == names
    for size in range(1, len(names)):
        for needs in itertools.combinations(names, size):
            some = gradients(Needs(**dict.fromkeys(needs, True)))
            assert tuple(some) == needs
            assert all(torch.equal(some[name], everything[name]) for name in needs)


def test_the_streams_gradient_alone_is_that_of_the_plain_call():
    """Bit for bit, and an output that nobody uses fills no zeros for the norm's parameters."""
    arguments, settings = arguments_of({"norm": "layer"})
    _, stream = fused(arguments, **settings, prenorm=True)
    given = torch.randn(3, 5, 10, dtype=torch.float64)
    found = torch.autograd.grad(stream, list(arguments.values()), given, allow_unused=True)
    plain = {name: t for name, t in arguments.items() if not name.startswith("norm_")}
    y = ak.bottleneck_adapter(**plain, backend="reference")
    expected = torch.autograd.grad(y, list(plain.values()), given)
    assert torch.equal(stream, y)
    assert found[len(plain) :] == (None, None)
    for one, other in zip(found, expected, strict=False):
        assert torch.equal(one, other)


def half_call(cast, weight_dtype=torch.bfloat16, dtype=torch.bfloat16):
    """A call whose adapter adds nothing to a stream of 3 and 1: its RMS is the root of 5."""
    x = torch.tensor([[3.0, 1.0]], dtype=dtype)
    zero = torch.zeros(1, 2, dtype=dtype)
    weight = torch.tensor([1.0, 3.0], dtype=weight_dtype)
    return with_norm(make_call(x, zero, zero.T), weight, None, "rms", 1e-12, 0.0, cast, True)


def of_weight(cast):
    call = half_call(cast, torch.float32)
    (y, _), saved = reference.forward_of_values(call)
    ones, needs = torch.ones(1, 2), Needs(norm_weight=True)
    return reference.backward(call, saved._replace(stream=y), Outputs(None, ones), needs)


def test_with_a_cast_the_weight_meets_what_the_forward_multiplied():
    """3 / sqrt(5) = 1.34164 is 1.34375 in bfloat16, and its gradient too."""
    exact = torch.tensor([3.0, 1.0]) / 5**0.5
    rounded = exact.bfloat16().float()
    assert rounded[0] == 1.34375
    for cast, xhat in ((False, exact), (True, rounded)):
        torch.testing.assert_close(of_weight(cast).norm_weight, xhat, rtol=1e-7, atol=0)
    (_, normed), _ = reference.forward(half_call(True))
    assert torch.equal(normed, (rounded * torch.tensor([1.0, 3.0])).bfloat16()[None])


def test_statistics_are_float32_whatever_the_stream_is_in():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        call = half_call(False, dtype, dtype)
        _, saved = reference.forward_of_values(call)
        assert saved.mean is None
        torch.testing.assert_close(saved.rstd, torch.tensor([5**-0.5], dtype=wide))
        mean, rstd = norm.statistics(call._replace(norm="layer"), call.x)
        torch.testing.assert_close(mean, torch.tensor([2.0], dtype=wide))
        torch.testing.assert_close(rstd, torch.tensor([1.0], dtype=wide))


def test_statistics_of_no_tokens_are_empty_and_silent():
    call = half_call(False)._replace(norm="layer")
    mean, rstd = norm.statistics(call, call.x[:0])
    assert mean.shape == rstd.shape == (0,)


def test_the_gradients_of_residual_and_skip_are_one_tensor():
    arguments, _ = arguments_of({})
    given = {name: t.detach() for name, t in arguments.items()}
    of_norm = [given.pop(name) for name in ("norm_weight", "norm_bias")]
    call = with_norm(make_call(**given), *of_norm, "layer", 1e-5, 0.0, False, False)
    (y, _), saved = reference.forward_of_values(call)
    upstream = Outputs(None, torch.randn(3, 5, 10, dtype=torch.float64))
    found = reference.backward(
        call, saved._replace(stream=y), upstream, Needs(residual=True, skip=True)
    )
    assert found.residual is found.skip
    torch.testing.assert_close(found.skip.sum(-1), torch.zeros(3, 5).double(), rtol=0, atol=1e-12)
