"""adapterkern.BottleneckAdapter: parameters, options, and the fused call."""

import copy
import pickle

import pytest
import torch
from eager import eager_adapter
from torch import nn
from torch.nn.utils import parametrizations

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
    [(768, None, 48), (768, 16, 48), (768, 2, 384), (10, 4, 2), (7, 16, 1), (9, 1.5, 6)],
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


def test_names_of_activations_are_read_in_either_case():
    names = [ak.BottleneckAdapter(4, activation=n).activation for n in ("GELU", "Swish", "ReLU")]
    assert names == ["gelu", "silu", "relu"]


def test_reset_parameters_begins_anew():
    adapter = adapter_of(scaling="channel", init="identity")
    before = adapter.down_proj.weight.clone()
    adapter.reset_parameters()
    assert not torch.equal(adapter.down_proj.weight, before)
    assert adapter.down_proj.weight.abs().max() <= 12**-0.5
    assert not adapter.up_proj.weight.any()
    assert torch.equal(adapter.scaling, torch.ones(12))


@pytest.mark.parametrize("init", ["identity", "houlsby", "bert"])
@pytest.mark.parametrize("reverse", [False, True], ids=["parents-first", "children-first"])
def test_a_model_from_the_meta_device_starts_as_its_init_says(init, reverse):
    """As FSDP and others materialise it: every submodule by itself, in either order."""
    adapter = ak.BottleneckAdapter(512, 256, init=init, scaling="channel", device="meta")
    modules = list(adapter.modules())
    for module in reversed(modules) if reverse else modules:
        module.to_empty(device="cpu", recurse=False)
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(7)
        module.reset_parameters()
    down, up = adapter.down_proj.weight, adapter.up_proj.weight
    stds = {"identity": ((3 * 512) ** -0.5, 0.0), "houlsby": (0.0088, 0.0088), "bert": (0.02, 0.02)}
    assert (down.std().item(), up.std().item()) == pytest.approx(stds[init], rel=0.02)
    assert bool(adapter.down_proj.bias.any()) == (init == "identity")
    assert not adapter.up_proj.bias.any()
    assert torch.equal(adapter.scaling, torch.ones(512))


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
        (
            (12, 4),
            {"reduction_factor": 3},
            "bottleneck_size (4) and reduction_factor (3) both fix the adapter's width.",
        ),
        ((12,), {"init": "zero"}, "known inits are identity, houlsby, bert"),
        ((12,), {"activation": "prelu"}, "known activations are gelu"),
        ((12,), {"backend": "cublas"}, "known backends are auto, triton, cuda, reference"),
        (
            (12,),
            {"scaling": "both"},
            'scaling must be a float, "learned" or "channel", got \'both\'',
        ),
        ((12,), {"scaling": float("nan")}, "scaling must be finite, got nan."),
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
    ("arguments", "message"),
    [
        ({"hidden_size": "12"}, "hidden_size must be an integer, got '12'."),
        ({"bottleneck_size": 2.5}, "bottleneck_size must be an integer, got 2.5."),
        ({"bottleneck_size": True}, "bottleneck_size must be an integer, got True."),
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
