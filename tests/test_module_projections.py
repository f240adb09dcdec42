"""Projections that must be called: hooked, wrapped, pruned, or with a forward of their own."""

import copy
import logging

import pytest
import torch
from test_module import CLOSE, adapter_of, expected_of
from torch import nn
from torch.nn.utils import prune

import adapterkern as ak


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
@pytest.mark.parametrize("name", ["down_proj", "up_proj"])
def test_hooks_on_a_projection_fire(spy, caplog, register, name):
    adapter, x = adapter_of(scaling="channel"), torch.randn(3, 12, requires_grad=True)
    fired = []
    handle = getattr(getattr(adapter, name), register)(lambda *a: fired.append(name))
    for _ in range(2):
        y = adapter(x, skip=x)
        y.sum().backward()
    assert fired == [name, name]
    assert not spy.forwards
    torch.testing.assert_close(y, expected_of(adapter, x, skip=x), **CLOSE)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"{name} has hooks and must be called to be itself" in caplog.text
    handle.remove()
    adapter(x)
    assert spy.forwards == [True]


@pytest.mark.parametrize("name", ["down_proj", "up_proj"])
def test_a_forward_set_on_a_projection_is_called(spy, caplog, name):
    """Activation patching and accelerate set it on the instance."""
    adapter, x = adapter_of(), torch.randn(3, 12)
    projection = getattr(adapter, name)
    inner = projection.forward
    projection.forward = lambda inputs: 2 * inner(inputs)
    found = adapter(x)
    assert f"{name} has a forward of its own and must be called to be itself" in caplog.text
    expected = x + adapter.up_proj(nn.functional.gelu(adapter.down_proj(x)))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not spy.forwards
    del projection.forward
    torch.testing.assert_close(adapter(x), expected_of(adapter, x), **CLOSE)
    assert spy.forwards == [True]


def test_a_hook_on_all_modules_sees_the_projections(spy):
    adapter, x, seen = adapter_of(), torch.randn(3, 12), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        found = adapter(x)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected_of(adapter, x), **CLOSE)
    assert seen == [adapter.down_proj, adapter.up_proj, adapter]
    assert not spy.forwards


@pytest.mark.parametrize("scaling", [0.5, "channel"])
def test_an_adapter_runs_where_accelerate_keeps_its_weights_elsewhere(scaling):
    """cpu_offload leaves meta tensors in the modules and loads the weights where one is called."""
    accelerate = pytest.importorskip("accelerate")
    adapter, x = adapter_of(scaling=scaling), torch.randn(3, 12)
    model = nn.Sequential(nn.Linear(12, 12), adapter)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert adapter.down_proj.weight.is_meta
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_a_wrapper_without_a_bias_is_called_and_shown():
    adapter, x = adapter_of(), torch.randn(3, 12)
    expected = adapter(x)
    adapter.down_proj = nn.Sequential(adapter.down_proj)
    torch.testing.assert_close(adapter(x), expected, **CLOSE)
    assert "bias=False" in adapter.extra_repr()


def test_a_hook_that_accelerate_took_away_leaves_the_adapter_fused(spy):
    hooks = pytest.importorskip("accelerate.hooks")
    adapter, x = adapter_of(), torch.randn(3, 12)
    hooks.add_hook_to_module(adapter.down_proj, hooks.ModelHook())
    adapter(x)
    assert not spy.forwards
    hooks.remove_hook_from_module(adapter.down_proj)
    adapter(x)
    assert spy.forwards == [True]


def test_projections_that_are_called_see_the_caller_s_autocast():
    """A wrapper may rely on it, and a hook is to see the dtype that a linear layer has there."""
    adapter, x, seen = adapter_of(), torch.randn(3, 12), []
    for projection in (adapter.down_proj, adapter.up_proj):
        projection.register_forward_hook(
            lambda module, inputs, output: seen.append(
                (inputs[0].dtype, output.dtype, torch.is_autocast_enabled("cpu"))
            )
        )
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
        expected = x + adapter.up_proj(nn.functional.gelu(adapter.down_proj(x)))
    assert seen[:2] == [(torch.float32, torch.bfloat16, True)] * 2
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


class LowRank(nn.Module):
    """A wrapper as LoRA's: the weight that it holds is not the weight that it applies."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


def test_a_wrapped_projection_is_called(spy, caplog):
    adapter, x = adapter_of(), torch.randn(3, 12)
    adapter.up_proj = LowRank(adapter.up_proj)
    u = expected_of(adapter, x, residual=None)
    torch.testing.assert_close(adapter(x), x + 2 * u, **CLOSE)
    assert "up_proj is a LowRank, which must be called to be itself" in caplog.text
    explanation = ak.explain(adapter, x)
    assert explanation.backend == "PyTorch modules"
    assert explanation.reasons["triton"] == (
        "up_proj is a LowRank, which must be called to be itself",
    )
    assert not spy.forwards


def test_a_wrapped_projection_under_a_named_kernel_raises(spy):
    adapter = adapter_of(backend="triton")
    adapter.up_proj = LowRank(adapter.up_proj)
    with pytest.raises(ak.BackendUnsupportedError, match="up_proj is a LowRank"):
        adapter(torch.randn(3, 12))


def test_pruning_is_respected(caplog):
    adapter, x = adapter_of(), torch.randn(3, 12)
    prune.random_unstructured(adapter.up_proj, "weight", amount=0.5)
    weight = adapter.up_proj.weight_orig * adapter.up_proj.weight_mask
    y = adapter(x)
    adapter.up_proj.weight = weight
    torch.testing.assert_close(y, expected_of(adapter, x), **CLOSE)


def test_dropout_reaches_the_module_path_too():
    adapter = adapter_of(dropout=0.5)
    adapter.up_proj.register_forward_hook(lambda *a: None)
    assert 0.3 < (adapter(torch.randn(100, 12), residual=None) == 0).float().mean() < 0.7


def hooked(**options):
    adapter = adapter_of(**options)
    adapter.down_proj.register_forward_hook(lambda *a: None)
    return adapter


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"residual": "inptu"}, ValueError, 'residual must be "input", a tensor or None'),
        (
            {"residual": torch.zeros(12)},
            ValueError,
            r"residual must have the shape of x, \[3, 12\]",
        ),
        ({"skip": torch.zeros(1, 12)}, ValueError, r"skip must have the shape of x, \[3, 12\]"),
        ({"x": torch.zeros(3, 9)}, ValueError, r"down_weight must .* to match x \[3, 9\]"),
        ({"x": torch.zeros(3, 12).long()}, ValueError, "x must be a floating-point tensor"),
        ({"x": torch.zeros(3, 12).double()}, ValueError, r"up_weight.* are float32 but"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ],
    ids=["name", "residual", "skip", "hidden-size", "integer", "float64", "list"],
)
def test_module_path_refuses_what_the_fused_path_refuses(arguments, error, message):
    arguments = {"x": torch.zeros(3, 12), **arguments}
    for adapter in (hooked(), adapter_of()):
        with pytest.raises(error, match=message) as caught:
            adapter(**arguments)
    assert "down_weight must be a floating" not in str(caught.value)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scaling", [0.5, "channel"])
@pytest.mark.parametrize("residual", ["input", None, "float32"])
def test_module_path_casts_as_the_fused_path_does(autocast, scaling, residual):
    """Float32 master weights with bfloat16 x, or under autocast with float32 x."""
    fused, x = adapter_of(scaling=scaling), torch.randn(5, 12)
    plain = copy.deepcopy(fused)
    plain.up_proj.register_forward_hook(lambda *a: None)
    if not autocast:
        x = x.bfloat16()
    if residual == "float32":
        residual = torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = plain(x, residual=residual), fused(x, residual=residual)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_module_path_takes_an_alias_that_was_assigned_later():
    adapter, x = hooked(), torch.randn(3, 12)
    adapter.activation = "swish"
    y = adapter(x)
    adapter.activation = "silu"
    torch.testing.assert_close(y, expected_of(adapter, x), **CLOSE)
