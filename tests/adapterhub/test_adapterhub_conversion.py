"""Modules of other libraries become `BottleneckAdapter`s over the same parameters.

The classes below are written here after the interfaces of those libraries: attributes and maths.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapterkern.integrations import adapterhub

H, R = 12, 5


def swish(z):
    return z * torch.sigmoid(z)


def gelu_new(z):
    return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


swish.__module__ = gelu_new.__module__ = "opendelta.delta_models.layers.activations"


class Swish(nn.SiLU):
    """NeMo's."""


Swish.__module__ = "nemo.collections.common.parts.activations"


class OpenDeltaLayer(nn.Module):
    """OpenDelta's AdapterLayer: parameters appear with the first input; functions are plain."""

    def __init__(self, function=gelu_new) -> None:
        super().__init__()
        self.bottleneck_dim = R
        self.instantiated = False
        self.function = function

    def instantiate(self, hidden_dim: int) -> None:
        activation = nn.Module()
        activation.f = self.function
        self.modulelist = nn.Sequential()
        self.modulelist.add_module("down_proj", nn.Linear(hidden_dim, R))
        self.modulelist.add_module("non_linear", activation)
        self.modulelist.add_module("up_proj", nn.Linear(R, hidden_dim))
        self.instantiated = True

    def post_forward(self, output):
        layers = self.modulelist
        return output + layers.up_proj(layers.non_linear.f(layers.down_proj(output)))


class SpeechBrainLinear(nn.Module):
    """SpeechBrain's HoulsbyAdapterLinear."""

    def __init__(self, bias: bool = True, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.pretrained_linear = nn.Linear(H, H)
        self.adapter_down_proj = nn.Linear(H, R, bias=bias)
        self.adapter_up_proj = nn.Linear(R, H, bias=bias)
        self.activation = activation or nn.SiLU()

    def forward(self, x):
        x = self.pretrained_linear(x)
        return self.adapter_up_proj(self.activation(self.adapter_down_proj(x))) + x


class LlmAdaptersLinear(nn.Linear):
    """The bottleneck Linear of LLM-Adapters, in its three places."""

    def __init__(self, adapter_type: str, scaling: float | nn.Parameter = 1.0) -> None:
        super().__init__(H, H)
        self.adapter_type = adapter_type
        self.adapter_dropout = nn.Dropout(0.2)
        self.adapter_down = nn.Linear(H, R, bias=False)
        self.adapter_up = nn.Linear(R, H, bias=False)
        self.act_fn = nn.Tanh()
        self.adapter_scaling = scaling

    def adapt(self, x):
        inner = self.act_fn(self.adapter_down(self.adapter_dropout(x)))
        return self.adapter_up(inner) * self.adapter_scaling

    def forward(self, x):
        if self.adapter_type == "mh_adapter":
            return F.linear(self.adapt(x) + x, self.weight, self.bias)
        y = F.linear(x, self.weight, self.bias)
        return y + self.adapt(y if self.adapter_type == "output_adapter" else x)


class NemoAdapter(nn.Module):
    """NeMo's LinearAdapter; without a norm as users subclass it."""

    def __init__(self, norm_position: str | None) -> None:
        super().__init__()
        layers = [nn.Linear(H, R, bias=False), Swish(inplace=True), nn.Linear(R, H, bias=False)]
        if norm_position == "pre":
            layers.insert(0, nn.LayerNorm(H))
        elif norm_position == "post":
            layers.append(nn.LayerNorm(H))
        self.module = nn.Sequential(*layers)
        self.norm_position = norm_position
        self.dropout = None

    def forward(self, x):
        return self.module(x)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, H)


def check(module, ours, theirs) -> None:
    """Same output, and gradients that arrive in the other library's parameters."""
    output, expected = ours(), theirs()
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    parameters = list(module.parameters())
    found = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [gelu_new, swish, F.relu, torch.tanh, F.gelu, F.leaky_relu],
    ids=lambda f: f.__name__,
)
def test_opendelta_converts_once_it_has_parameters(x, function):
    module = OpenDeltaLayer(function)
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="before it has seen"):
        adapterhub.from_module(module)
    module.instantiate(H)
    adapter = adapterhub.from_module(module)
    assert adapter.down_proj.weight is module.modulelist.down_proj.weight
    check(module, lambda: adapter(x), lambda: module.post_forward(x))


@pytest.mark.parametrize("bias", [True, False])
def test_speechbrain_converts(x, bias):
    module = SpeechBrainLinear(bias)
    adapter = adapterhub.from_module(module)
    assert (adapter.up_proj.bias is None) is not bias
    check(module, lambda: adapter(module.pretrained_linear(x)), lambda: module(x))


@pytest.mark.parametrize("place", ["mh_adapter", "output_adapter", "parallel_adapter"])
@pytest.mark.parametrize("learned", [False, True])
def test_llm_adapters_convert_in_every_place(x, place, learned):
    scaling = nn.Parameter(torch.tensor([0.7])) if learned else 0.5
    module = LlmAdaptersLinear(place, scaling).eval()
    with pytest.raises(
        adapterhub.UnsupportedAdapterError, match=r"drops out(.|\n)*adapter_dropout\.p"
    ):
        adapterhub.from_module(module)
    module.adapter_dropout.p = 0.0
    adapter = adapterhub.from_module(module)
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
    adapter = adapterhub.from_module(module)
    check(module, lambda: adapter(x, residual=None), lambda: module(x))
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="its own LayerNorm before"):
        adapterhub.from_module(NemoAdapter("pre"))
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="its own LayerNorm after"):
        adapterhub.from_module(NemoAdapter("post"))


def test_nemo_with_other_layers_is_refused_by_what_they_are():
    module = NemoAdapter(None)
    module.module.append(nn.Tanh())
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="Linear, Swish, Linear, Tanh"):
        adapterhub.from_module(module)
    for index, norm, why in (
        (0, nn.RMSNorm(H), "its own RMSNorm before"),
        (2, nn.LayerNorm(R), "its own LayerNorm between"),
    ):
        module = NemoAdapter(None)
        module.module.insert(index, norm)
        with pytest.raises(adapterhub.UnsupportedAdapterError, match=why):
            adapterhub.from_module(module)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout_comes_with_its_mode(x, training):
    module = NemoAdapter(None)
    module.dropout = nn.Dropout(0.5)
    adapter = adapterhub.from_module(module.train(training))
    assert (adapter.training, adapter.dropout) == (training, 0.5)
    if not training:
        check(module, lambda: adapter(x, residual=None), lambda: module(x))
    module.dropout.train(not training)
    assert adapterhub.from_module(module).training == (not training)
    module.dropout = nn.AlphaDropout(0.5)
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="dropout is a AlphaDropout"):
        adapterhub.from_module(module)


def test_llm_adapters_that_are_switched_off_are_refused():
    module = LlmAdaptersLinear("mh_adapter")
    module.adapter_dropout.p = 0.0
    module.disable_adapters = True
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="disable_adapters = False"):
        adapterhub.from_module(module)


def test_hooked_modules_are_refused():
    hooked, overridden = SpeechBrainLinear(), SpeechBrainLinear()
    hooked.adapter_up_proj.register_forward_hook(lambda *_: None)
    overridden.adapter_down_proj.forward = lambda x: x
    for module in (hooked, overridden):
        with pytest.raises(adapterhub.UnsupportedAdapterError, match=r"hooks(.|\n)*take them off"):
            adapterhub.from_module(module)


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
        adapterhub.from_module(module)
        handle = part.register_forward_hook(lambda *_: None)
        with pytest.raises(adapterhub.UnsupportedAdapterError, match="hooks"):
            adapterhub.from_module(module)
        handle.remove()


def test_unknown_activations_and_modules_are_refused():
    def swish(z):  # of nobody that is known
        return z * torch.sigmoid(2 * z)

    class Swish(nn.SiLU):
        pass

    module = OpenDeltaLayer(swish)
    module.instantiate(H)
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="no fused form"):
        adapterhub.from_module(module)
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="no fused form"):
        adapterhub.from_module(SpeechBrainLinear(activation=Swish()))
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="Mish"):
        adapterhub.from_module(SpeechBrainLinear(activation=nn.Mish()))
    with pytest.raises(TypeError, match="Linear is no adapter"):
        adapterhub.from_module(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "config",
    [
        "seq_bn",
        "double_seq_bn[non_linearity='gelu']",
        "scaled_par_bn",
        "seq_bn[scaling='channel']",
        "seq_bn[dropout=0.5]",
    ],
)
def test_adapterhub_modules_convert(config):
    pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)
    import adapterhub_models as models

    model = models.build("bert")
    model.add_adapter("a", config=config)
    models.randomise_adapters(model)
    module = model.get_submodule("encoder.layer.0.output").adapters["a"].eval()
    adapter = adapterhub.from_module(module)
    x, residual = torch.randn(2, 3, models.HIDDEN), torch.randn(2, 3, models.HIDDEN)
    parallel = type(module).__name__ == "ParallelAdapter"
    check(
        module,
        lambda: adapter(x, residual=None if parallel else residual),
        lambda: module(x, residual)[0],
    )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("compacter++[reduction_factor=4]", "Kronecker"),
        ("seq_bn[use_gating=True]", "gated"),
        ("seq_bn[ln_before=True]", "before the down"),
        ("seq_bn[ln_after=True]", "after the up"),
        ("seq_bn[non_linearity='mish']", "no fused form"),
    ],
)
def test_adapterhub_modules_of_other_maths_are_refused(config, why):
    pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)
    import adapterhub_models as models

    model = models.build("bert")
    model.add_adapter("a", config=config)
    module = model.get_submodule("encoder.layer.0.output").adapters["a"]
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=why):
        adapterhub.from_module(module)


def test_adapterhub_modules_with_stochastic_depth_are_refused_in_evaluation_too():
    pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)
    import adapterhub_models as models

    model = models.bert()
    module = model.get_submodule("encoder.layer.0.output").adapters["a"]
    module.DropPath = nn.Identity()  # torchvision's StochasticDepth, which has a p
    module.DropPath.p = 0.1
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=r"rows(.|\n)*DropPath\.p = 0"):
        adapterhub.from_module(module.eval())
    parallel = models.bert("par_bn").get_submodule("encoder.layer.0.output").adapters["a"]
    parallel.DropPath = module.DropPath  # which its forward does not call
    assert adapterhub.from_module(parallel).down_proj.weight is parallel.adapter_down[0].weight
    module.DropPath.p = 0.0
    assert adapterhub.from_module(module).down_proj.weight is module.adapter_down[0].weight


def test_adapterhub_modules_are_taken_as_they_are_called():
    pytest.importorskip("adapters", reason="needs the adapters library", exc_type=ImportError)
    import adapterhub_models as models

    module = models.bert().get_submodule("encoder.layer.0.output").adapters["a"]
    module.DropPath = nn.Identity()
    module.DropPath.p = 0.0
    for part in (module, module.adapter_down, module.non_linearity, module.DropPath):
        handle = part.register_forward_hook(lambda *_: None)
        with pytest.raises(adapterhub.UnsupportedAdapterError, match="hooks"):
            adapterhub.from_module(module)
        handle.remove()
    module.adapter_down[1] = nn.Tanh()  # module.non_linearity is not called any more
    adapter = adapterhub.from_module(module)
    x = torch.randn(2, 3, models.HIDDEN)
    check(module, lambda: adapter(x), lambda: module(x, x)[0])
    module.adapter_down.append(nn.Dropout())
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="adapter_down is not"):
        adapterhub.from_module(module)
