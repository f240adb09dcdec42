"""Modules of other libraries become `BottleneckAdapter`s over the same parameters."""

import pytest
import torch
from foreign_modules import (
    H,
    LlmAdaptersLinear,
    NemoAdapter,
    OpenDeltaLayer,
    R,
    SpeechBrainLinear,
    check,
    gelu_new,
    swish,
)
from foreign_modules import (
    Swish as NemoSwish,
)
from torch import nn
from torch.nn import functional as F

from adapterkern import UnsupportedAdapterError
from adapterkern.integrations import foreign


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, H)


@pytest.mark.parametrize(
    "function",
    [gelu_new, swish, F.relu, torch.tanh, F.gelu, F.leaky_relu],
    ids=lambda f: f.__name__,
)
def test_opendelta_converts_once_it_has_parameters(x, function):
    module = OpenDeltaLayer(function)
    with pytest.raises(UnsupportedAdapterError, match="before it has seen"):
        foreign.from_module(module)
    module.instantiate(H)
    adapter = foreign.from_module(module)
    assert adapter.down_proj.weight is module.modulelist.down_proj.weight
    check(module, lambda: adapter(x), lambda: module.post_forward(x))


@pytest.mark.parametrize("bias", [True, False])
def test_speechbrain_converts(x, bias):
    module = SpeechBrainLinear(bias)
    adapter = foreign.from_module(module)
    assert (adapter.up_proj.bias is None) is not bias
    check(module, lambda: adapter(module.pretrained_linear(x)), lambda: module(x))


@pytest.mark.parametrize("place", ["mh_adapter", "output_adapter", "parallel_adapter"])
@pytest.mark.parametrize("learned", [False, True])
def test_llm_adapters_convert_in_every_place(x, place, learned):
    scaling = nn.Parameter(torch.tensor([0.7])) if learned else 0.5
    module = LlmAdaptersLinear(place, scaling).eval()
    with pytest.raises(UnsupportedAdapterError, match=r"drops out(.|\n)*adapter_dropout\.p"):
        foreign.from_module(module)
    module.adapter_dropout.p = 0.0
    adapter = foreign.from_module(module)
    linear = nn.Linear(H, H)
    linear.weight, linear.bias = module.weight, module.bias
    ours = {
        "mh_adapter": lambda: linear(adapter(x)),
        "output_adapter": lambda: adapter(linear(x)),
        "parallel_adapter": lambda: adapter(x, residual=linear(x)),
    }
    check(module.train(), ours[place], lambda: module(x))


def test_nemo_converts_without_a_norm_and_is_declined_with_one(x):
    module = NemoAdapter(None)
    adapter = foreign.from_module(module)
    check(module, lambda: adapter(x, residual=None), lambda: module(x))
    with pytest.raises(UnsupportedAdapterError, match="its own LayerNorm before"):
        foreign.from_module(NemoAdapter("pre"))
    with pytest.raises(UnsupportedAdapterError, match="its own LayerNorm after"):
        foreign.from_module(NemoAdapter("post"))


def test_nemo_with_other_layers_is_refused_by_what_they_are():
    module = NemoAdapter(None)
    module.module.append(nn.Tanh())
    with pytest.raises(UnsupportedAdapterError, match="Linear, Swish, Linear, Tanh"):
        foreign.from_module(module)
    for index, norm, why in (
        (0, nn.RMSNorm(H), "its own RMSNorm before"),
        (2, nn.LayerNorm(R), "its own LayerNorm between"),
    ):
        module = NemoAdapter(None)
        module.module.insert(index, norm)
        with pytest.raises(UnsupportedAdapterError, match=why):
            foreign.from_module(module)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout_comes_with_its_mode(x, training):
    module = NemoAdapter(None)
    module.dropout = nn.Dropout(0.5)
    adapter = foreign.from_module(module.train(training))
    assert (adapter.training, adapter.dropout) == (training, 0.5)
    if not training:
        check(module, lambda: adapter(x, residual=None), lambda: module(x))
    module.dropout.train(not training)
    assert foreign.from_module(module).training == (not training)
    module.dropout = nn.AlphaDropout(0.5)
    with pytest.raises(UnsupportedAdapterError, match="dropout is a AlphaDropout"):
        foreign.from_module(module)


def test_llm_adapters_that_are_switched_off_are_refused():
    module = LlmAdaptersLinear("mh_adapter")
    module.adapter_dropout.p = 0.0
    module.disable_adapters = True
    with pytest.raises(UnsupportedAdapterError, match="disable_adapters = False"):
        foreign.from_module(module)


def test_hooked_modules_are_refused():
    hooked, overridden = SpeechBrainLinear(), SpeechBrainLinear()
    hooked.adapter_up_proj.register_forward_hook(lambda *_: None)
    overridden.adapter_down_proj.forward = lambda x: x
    for module in (hooked, overridden):
        with pytest.raises(UnsupportedAdapterError, match=r"hooks(.|\n)*take them off"):
            foreign.from_module(module)


def test_hooks_on_what_stands_around_the_projections_are_refused():
    delta, llm, nemo = OpenDeltaLayer(), LlmAdaptersLinear("mh_adapter"), NemoAdapter(None)
    delta.instantiate(H)
    llm.adapter_dropout.p = 0.0
    for module, part in (
        (delta, delta.modulelist),
        (delta, delta.modulelist.non_linear),
        (llm, llm.adapter_dropout),
        (nemo, nemo.module),
    ):
        foreign.from_module(module)
        handle = part.register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedAdapterError, match="hooks"):
            foreign.from_module(module)
        handle.remove()


def test_unknown_activations_and_modules_are_refused():
    def swish(z):  # of nobody that is known
        return z * torch.sigmoid(2 * z)

    class Swish(nn.SiLU):
        pass

    module = OpenDeltaLayer(swish)
    module.instantiate(H)
    with pytest.raises(UnsupportedAdapterError, match="no fused form"):
        foreign.from_module(module)
    with pytest.raises(UnsupportedAdapterError, match="no fused form"):
        foreign.from_module(SpeechBrainLinear(activation=Swish()))
    with pytest.raises(UnsupportedAdapterError, match="Mish"):
        foreign.from_module(SpeechBrainLinear(activation=nn.Mish()))
    with pytest.raises(TypeError, match="Linear is no adapter"):
        foreign.from_module(nn.Linear(2, 2))


def test_a_sequence_with_a_forward_of_its_own_is_refused():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    module = NemoAdapter(None)
    module.module = Doubled(*module.module)
    with pytest.raises(UnsupportedAdapterError, match="its Doubled has a forward of its own"):
        foreign.from_module(module)


class MyLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("part", "made", "why"),
    [
        ("adapter_down_proj", MyLinear(H, R), "a projection is a MyLinear, not a plain nn.Linear"),
        ("adapter_up_proj", MyLinear(R, H), "a projection is a MyLinear"),
        ("adapter_up_proj", nn.Linear(R, 1), f"maps {H} features to 1, so x cannot be added"),
        ("adapter_up_proj", nn.Linear(R + 1, H), f"gives {R} features, .* takes {R + 1}"),
    ],
)
def test_projections_that_are_not_two_plain_ones_that_meet_are_refused(part, made, why):
    module = SpeechBrainLinear()
    setattr(module, part, made)
    with pytest.raises(UnsupportedAdapterError, match=why):
        foreign.from_module(module)


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.LeakyReLU(), "leaky_relu")],
    ids=["gelu", "gelu_tanh", "leaky_relu"],
)
def test_the_form_of_an_activation_is_that_of_the_instance(x, activation, name):
    module = SpeechBrainLinear(activation=activation)
    adapter = foreign.from_module(module)
    assert adapter.activation == name
    check(module, lambda: adapter(module.pretrained_linear(x)), lambda: module(x))


def test_an_option_that_makes_another_function_of_an_activation_is_refused():
    refused = [nn.LeakyReLU(0.2), nn.GELU()]
    refused[1].__class__ = type("GELUActivation", (nn.GELU,), {"act": staticmethod(torch.erf)})
    refused[1].__class__.__module__ = "transformers.activations"
    slow = NemoSwish()
    slow.beta = 2.0
    for activation in (*refused, slow):
        with pytest.raises(UnsupportedAdapterError, match="no fused form"):
            foreign.from_module(SpeechBrainLinear(activation=activation))
    slow.beta = 1.0
    assert foreign.from_module(SpeechBrainLinear(activation=slow)).activation == "silu"
