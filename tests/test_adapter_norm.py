"""`AdapterNorm`: the modules that exist, in one pass."""

import copy
import pickle

import pytest
import torch
from torch import nn

import adapterkern as ak
from adapterkern.modules import adapter_norm
from adapterkern.modules.adapter_norm import describe

H, R = 10, 4


def parts(norm=nn.LayerNorm, dtype=torch.float32, **options):
    adapter = ak.BottleneckAdapter(H, R, init="bert", dtype=dtype, **options)
    norm = norm(H, dtype=dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    return adapter, norm


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    """The plain op with torch's norm, and the hand-written norm."""
    with ak.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("eps", [None, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_it_equals_its_two_modules(backend, kind, dtype, eps):
    adapter, norm = parts(kind, dtype)
    if eps is not None or kind is nn.RMSNorm:
        norm.eps = eps
    layer = ak.AdapterNorm(adapter, norm)
    x, skip = torch.randn(2, 5, H, dtype=dtype) * 1e-2, torch.randn(2, 5, H, dtype=dtype) * 1e-2
    close = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 3e-2, "atol": 3e-2}
    )
    normed, stream = layer(x, skip=skip, prenorm=True)
    expected = adapter(x, skip=skip)
    assert torch.equal(stream, expected)
    torch.testing.assert_close(normed, norm(expected), **close)
    assert normed.dtype == dtype
    torch.testing.assert_close(layer(x, None, skip), norm(adapter(x, None, skip)), **close)


def test_gradients_reach_both_modules(backend):
    adapter, norm = parts(scaling="learned")
    layer, x = ak.AdapterNorm(adapter, norm), torch.randn(5, H, requires_grad=True)
    leaves = [x, *layer.parameters()]
    dy = torch.randn(5, H)
    found = torch.autograd.grad(layer(x), leaves, dy)
    expected = torch.autograd.grad(norm(adapter(x)), leaves, dy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_has_no_parameters_of_its_own():
    adapter, norm = parts()
    layer = ak.AdapterNorm(adapter, norm)
    assert [*layer.parameters()] == [*adapter.parameters(), *norm.parameters()]
    assert layer.norm.weight is norm.weight
    names = [f"adapter.{n}" for n in adapter.state_dict()]
    assert [*layer.state_dict()] == [*names, "norm.weight", "norm.bias"]
    other = ak.AdapterNorm(*parts())
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, H)
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))


def test_a_frozen_norm_or_adapter_gets_no_gradient(spy):
    for frozen in ("norm", "adapter"):
        layer = ak.AdapterNorm(*parts())
        getattr(layer, frozen).requires_grad_(False)
        layer(torch.randn(5, H)).sum().backward()
        asked = spy.backwards.pop()
        assert (asked.norm_weight, asked.norm_bias) == (frozen != "norm",) * 2
        assert asked.down_weight == (frozen != "adapter")
        for name, parameter in layer.named_parameters():
            assert (parameter.grad is None) == name.startswith(frozen)


def test_without_parameters_it_only_normalises(backend):
    adapter, x = ak.BottleneckAdapter(H, R, init="bert"), torch.randn(5, H)
    for norm in (nn.LayerNorm(H, elementwise_affine=False), nn.LayerNorm(H, bias=False)):
        found = ak.AdapterNorm(adapter, norm)(x)
        torch.testing.assert_close(found, norm(adapter(x)), rtol=1e-5, atol=1e-6)


def test_dropout_and_the_mode_are_read_at_each_call(backend):
    adapter, norm = parts(dropout=0.5)
    layer, x = ak.AdapterNorm(adapter, norm), torch.randn(50, H)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), norm(adapter(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["norm", "adapter", "adapter.down_proj"])
def test_a_hook_is_called(spy, caplog, which):
    layer, x = ak.AdapterNorm(*parts()), torch.randn(5, H)
    expected, seen = layer(x), []
    layer.get_submodule(which).register_forward_hook(lambda *_: seen.append(which))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert seen == [which]
    assert "must be called to be itself" in caplog.text
    assert "must be called" in str(ak.explain(layer, x))
    layer.adapter.backend = "triton"
    with pytest.raises(ak.BackendUnsupportedError, match="must be called to be itself"):
        layer(x)


def test_a_norm_of_another_dtype_keeps_what_it_returns(caplog):
    """torch returns the dtype of the stream, the kernels would widen it."""
    adapter, _ = parts(dtype=torch.bfloat16)
    norm, x = nn.LayerNorm(H), torch.randn(5, H, dtype=torch.bfloat16)
    normed = ak.AdapterNorm(adapter, norm)(x)
    assert torch.equal(normed, norm(adapter(x)))
    assert normed.dtype == torch.bfloat16
    assert "would return float32 where the norm itself returns bfloat16" in caplog.text


@pytest.mark.parametrize("enabled", [False, True])
def test_under_autocast_a_norm_without_parameters_is_asked_too(monkeypatch, caplog, enabled):
    """On a GPU autocast runs it in float32, which the kernels would not return."""
    monkeypatch.setattr(adapter_norm, "dtype_reason", lambda call: "as on a GPU")
    layer = ak.AdapterNorm(parts()[0], nn.LayerNorm(H, elementwise_affine=False))
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        layer(torch.randn(5, H))
    assert ("as on a GPU" in caplog.text) == enabled


def test_explain_names_the_feature_and_the_backend():
    layer, x = ak.AdapterNorm(*parts()), torch.randn(5, H)
    found = ak.explain(layer, x, prenorm=True)
    assert "layer_norm" in found.call
    assert found.backend == "reference, then torch's LayerNorm"
    with ak.use_backend("reference"):
        assert ak.explain(layer, x).backend == "reference (named)"
    other = ak.AdapterNorm(*parts(nn.RMSNorm))
    assert "rms_norm" in ak.explain(other, x).call
    model = nn.Sequential(layer, other, other.adapter)
    rows = ak.explain(model, x).rows
    assert [(r.adapter, r.calls, r.norm) for r in rows] == [
        ("0.adapter", 1, "LayerNorm"),
        ("1.adapter", 1, "RMSNorm"),
        ("1.adapter", 1, ""),
    ]


def test_torch_fx_makes_one_node_of_it():
    layer, x = ak.AdapterNorm(*parts()), torch.randn(5, H)
    graph = torch.fx.symbolic_trace(layer)
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert targets == [ak.bottleneck_adapter_norm]
    torch.testing.assert_close(graph(x), layer(x))


class Subclass(nn.LayerNorm):
    pass


WRONG = {
    "adapter": ((nn.Linear(H, H), nn.LayerNorm(H)), "adapter must be a BottleneckAdapter, got Lin"),
    "norm": ((None, nn.GroupNorm(2, H)), "norm must be an nn.LayerNorm or an nn.RMSNorm"),
    "subclass": ((None, Subclass(H)), "got Subclass, a subclass of LayerNorm"),
    "width": ((None, nn.LayerNorm(H + 1)), "over the adapter's hidden_size 10, got normalized_sha"),
    "dimensions": ((None, nn.LayerNorm((5, H))), "the last dimension alone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused(case):
    (adapter, norm), message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        ak.AdapterNorm(adapter or ak.BottleneckAdapter(H, R), norm)


def test_the_norm_that_torch_takes_without_an_eps_is_known():
    norm = nn.RMSNorm(H)
    assert norm.eps is None
    assert describe(norm).eps == torch.finfo(torch.float32).eps
    assert describe(norm.double()).eps == torch.finfo(torch.float64).eps
    assert describe(norm.half()).eps == torch.finfo(torch.float32).eps
