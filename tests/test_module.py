"""adapterkern.BottleneckAdapter: parameters, options, and what becomes of wrapped projections."""

import copy
import logging
import pickle

import pytest
import torch
from eager import eager_adapter
from torch import nn
from torch.nn.utils import parametrizations, prune

import adapterkern as ak

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def adapter_of(hidden=12, bottleneck=4, init="bert", **options):
    adapter = ak.BottleneckAdapter(hidden, bottleneck, init=init, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.5)
    return adapter


def expected_of(adapter, x, **options):
    down, up = adapter.down_proj, adapter.up_proj
    return eager_adapter(
        x, down.weight, up.weight, down.bias, up.bias,
        activation=adapter.activation, scaling=adapter.scaling, **options,
    )  # fmt: skip


def test_parameters_have_the_documented_names_and_shapes():
    shapes = {n: tuple(p.shape) for n, p in ak.BottleneckAdapter(12, 4).named_parameters()}
    assert shapes == {
        "down_proj.weight": (4, 12), "down_proj.bias": (4,),
        "up_proj.weight": (12, 4), "up_proj.bias": (12,),
    }  # fmt: skip
    bare = ak.BottleneckAdapter(12, 4, bias=False, scaling="channel")
    shapes = {n: tuple(p.shape) for n, p in bare.named_parameters()}
    assert shapes == {"scaling": (12,), "down_proj.weight": (4, 12), "up_proj.weight": (12, 4)}
    assert ak.BottleneckAdapter(12, 4, scaling="learned").scaling.shape == (1,)


@pytest.mark.parametrize(
    ("hidden", "factor", "expected"),
    [(768, 16, 48), (768, 2, 384), (10, 4, 2), (7, 16, 1), (9, 1.5, 6)],
)
def test_bottleneck_size_follows_the_reduction_factor(hidden, factor, expected):
    adapter = ak.BottleneckAdapter(hidden, reduction_factor=factor)
    assert adapter.bottleneck_size == expected
    assert adapter.down_proj.weight.shape == (expected, hidden)


@pytest.mark.parametrize("scaling", [1.0, 0.3, "learned", "channel"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swish"])
def test_forward_is_the_eager_composition(scaling, bias, activation):
    adapter = adapter_of(scaling=scaling, bias=bias, activation=activation)
    x, residual, skip = torch.randn(3, 2, 5, 12)
    for options in ({}, {"residual": residual}, {"residual": None, "skip": skip}):
        y = adapter(x, **options)
        torch.testing.assert_close(y, expected_of(adapter, x, **options), **CLOSE)
    found = torch.autograd.grad(adapter(x, residual, skip).square().sum(), adapter.parameters())
    eager = expected_of(adapter, x, residual=residual, skip=skip)
    expected = torch.autograd.grad(eager.square().sum(), adapter.parameters())
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "sigmoid"])
def test_identity_init_returns_the_residual_bit_for_bit(dtype, activation):
    adapter = ak.BottleneckAdapter(96, dtype=dtype, activation=activation, scaling="learned")
    x, residual = torch.randn(2, 37, 96).to(dtype)
    assert torch.equal(adapter(x), x)
    assert torch.equal(adapter(x, residual), residual)
    assert adapter.down_proj.weight.std() > 0.01


def test_inits_draw_what_they_say():
    houlsby = ak.BottleneckAdapter(512, 256, init="houlsby")
    for projection in (houlsby.down_proj, houlsby.up_proj):
        assert projection.weight.abs().max() <= 0.02
        # A normal of sigma 1, cut at 2 sigma, has a standard deviation of 0.88.
        assert projection.weight.std().item() == pytest.approx(0.0088, rel=0.02)
        assert not projection.bias.any()
    bert = ak.BottleneckAdapter(512, 256, init="bert")
    for projection in (bert.down_proj, bert.up_proj):
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not projection.bias.any()
    identity = ak.BottleneckAdapter(512, 256)
    assert identity.down_proj.weight.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.02)
    assert identity.down_proj.bias.any()
    assert not identity.up_proj.weight.any()
    assert not identity.up_proj.bias.any()


def test_reset_parameters_begins_anew():
    adapter = adapter_of(scaling="channel", init="identity")
    before = adapter.down_proj.weight.clone()
    adapter.reset_parameters()
    assert not torch.equal(adapter.down_proj.weight, before)
    assert adapter.down_proj.weight.abs().max() <= 12**-0.5
    assert not adapter.up_proj.weight.any()
    assert torch.equal(adapter.scaling, torch.ones(12))


def test_device_and_dtype_reach_every_parameter():
    adapter = ak.BottleneckAdapter(12, 4, scaling="channel", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in adapter.parameters()} == {("meta", torch.bfloat16)}
    y = adapter(torch.empty(3, 12, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((3, 12), torch.bfloat16, "meta")


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((12, 0), {}, "hidden_size and bottleneck_size must be at least 1, got 12 and 0."),
        ((0, 4), {}, "at least 1, got 0 and 4."),
        ((12,), {"reduction_factor": 0}, "reduction_factor must be positive, got 0."),
        ((12,), {"init": "zero"}, "known inits are identity, houlsby, bert"),
        ((12,), {"activation": "prelu"}, "known activations are gelu"),
        ((12,), {"backend": "cublas"}, "known backends are auto, triton, cuda, reference"),
        (
            (12,),
            {"scaling": "both"},
            'scaling must be a float, "learned" or "channel", got \'both\'',
        ),
        ((12,), {"dropout": 1.0}, "dropout must be in [0, 1), got 1.0."),
    ],
)
def test_bad_arguments_are_named_with_their_cure(arguments, options, expected):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        ak.BottleneckAdapter(*arguments, **options)
    assert expected in str(caught.value)


def test_scaling_of_another_type_is_a_type_error():
    with pytest.raises(
        TypeError, match='scaling must be a float, "learned" or "channel", got None'
    ):
        ak.BottleneckAdapter(12, scaling=None)


def test_extra_repr_tells_every_option():
    adapter = ak.BottleneckAdapter(
        12, 4, activation="swish", bias=False, scaling="channel", dropout=0.1, init="bert",
        backend="reference",
    )  # fmt: skip
    assert adapter.extra_repr() == (
        "hidden_size=12, bottleneck_size=4, activation=silu, bias=False, scaling=channel, "
        "dropout=0.1, init=bert, backend=reference"
    )
    assert "scaling=0.5" in repr(ak.BottleneckAdapter(12, scaling=0.5))
    assert "scaling=learned" in repr(ak.BottleneckAdapter(12, scaling="learned"))


def test_dropout_applies_in_training_only(clean_dispatch):
    adapter = adapter_of(dropout=0.5)
    x = torch.randn(200, 12)
    u = expected_of(adapter, x, residual=None)
    trained = adapter(x, residual=None)
    zeroed = trained == 0
    assert 0.4 < zeroed.float().mean() < 0.6
    torch.testing.assert_close(trained, torch.where(zeroed, 0, 2 * u), **CLOSE)
    torch.testing.assert_close(adapter.eval()(x, residual=None), u, **CLOSE)


def test_a_named_backend_that_cannot_run_raises():
    adapter = ak.BottleneckAdapter(12, 4, backend="cuda")
    with pytest.raises(ak.BackendUnsupportedError, match='backend "cuda" cannot run this call'):
        adapter(torch.zeros(1, 12))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_equal(copied):
    adapter = adapter_of(scaling="channel", activation="relu")
    x = torch.randn(3, 12)
    twin = copied(adapter)
    expected = adapter(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        adapter.up_proj.weight.zero_()
    assert torch.equal(twin(x), expected)
    assert repr(twin) == repr(adapter)


def test_state_dict_moves_between_adapters_and_files(tmp_path):
    adapter, other = adapter_of(scaling="learned"), adapter_of(scaling="learned")
    torch.save(adapter.state_dict(), tmp_path / "adapter.pt")
    other.load_state_dict(torch.load(tmp_path / "adapter.pt", weights_only=True))
    x = torch.randn(3, 12)
    assert torch.equal(other(x), adapter(x))


def test_casts_follow_the_module():
    adapter = adapter_of(scaling="channel").to(torch.bfloat16)
    x = torch.randn(3, 12)
    assert adapter(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(adapter.double()(x.double()), expected_of(adapter, x.double()))


def test_weights_that_are_replaced_are_used_at_once():
    adapter, x = adapter_of(), torch.randn(3, 12)
    adapter(x)
    adapter.up_proj.weight.data = torch.zeros(12, 4)
    adapter.up_proj = nn.Linear(4, 12)
    torch.testing.assert_close(adapter(x), expected_of(adapter, x), **CLOSE)
    adapter.down_proj.weight = nn.Parameter(torch.ones(4, 12))
    torch.testing.assert_close(adapter(x), expected_of(adapter, x), **CLOSE)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_projections_stay_fused_and_get_gradients(spy, wrap):
    adapter, x = adapter_of(), torch.randn(3, 12)
    wrap(adapter.down_proj).eval()
    y = adapter(x)
    assert spy.forwards == [True]
    torch.testing.assert_close(y, expected_of(adapter, x), **CLOSE)
    found = torch.autograd.grad(y.sum(), adapter.down_proj.parameters())
    expected = torch.autograd.grad(expected_of(adapter, x).sum(), adapter.down_proj.parameters())
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)


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
        ({"x": torch.zeros(3, 12).double()}, ValueError, "down_weight is float32 but"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": "12"}, "hidden_size must be an integer, got '12'."),
        ({"bottleneck_size": 2.5}, "bottleneck_size must be an integer, got 2.5."),
        ({"reduction_factor": "16"}, "reduction_factor must be a number, got '16'."),
        ({"dropout": "x"}, "dropout must be a number in [0, 1), got 'x'."),
        ({"activation": ["gelu"]}, "activation must be a name, such as \"gelu\", got ['gelu']."),
        ({"activation": None}, 'activation must be a name, such as "gelu", got None.'),
    ],
)
def test_an_argument_of_another_type_is_a_type_error(arguments, message):
    with pytest.raises(TypeError) as caught:
        ak.BottleneckAdapter(**{"hidden_size": 12, **arguments})
    assert str(caught.value) == message


def test_a_dtype_that_is_not_floating_point_is_refused():
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got torch.int32"):
        ak.BottleneckAdapter(12, 4, dtype=torch.int32)
