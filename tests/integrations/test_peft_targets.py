import peft
import pytest
import torch
import transformers
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


def per_layer(*names, layers=2):
    return {name.replace("*", str(index)) for name in names for index in range(layers)}


BERT = per_layer("encoder.layer.*.attention.output.dense", "encoder.layer.*.output.dense")
LLAMA = per_layer("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj")
GPT2 = per_layer("transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj")
DEFAULTS = {
    "bert": BERT,
    "bert-classifier": {f"bert.{name}" for name in BERT},
    "roberta": BERT,
    "roberta-classifier": {f"roberta.{name}" for name in BERT},
    "distilbert": per_layer(
        "transformer.layer.*.attention.out_lin", "transformer.layer.*.ffn.lin2"
    ),
    "gpt2": GPT2,
    "gpt2-cross": GPT2 | per_layer("transformer.h.*.crossattention.c_proj"),
    "opt": per_layer("model.decoder.layers.*.self_attn.out_proj", "model.decoder.layers.*.fc2"),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gemma": LLAMA,
    "t5": per_layer(
        "encoder.block.*.layer.0.SelfAttention.o",
        "encoder.block.*.layer.1.DenseReluDense.wo",
        "decoder.block.*.layer.0.SelfAttention.o",
        "decoder.block.*.layer.1.EncDecAttention.o",
        "decoder.block.*.layer.2.DenseReluDense.wo",
    ),
    "vit": per_layer("layers.*.attention.o_proj", "layers.*.mlp.fc2") if TRANSFORMERS_5 else BERT,
}


def adapted(model):
    """Return the names of the adapted layers, seen from the base model."""
    modules = model.get_base_model().named_modules()
    return {name for name, module in modules if isinstance(module, BottleneckLinear)}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_output_projections_and_nothing_else(tiny, batch, output, name):
    base = tiny(name)
    expected = output(base, batch(name))
    model = peft.get_peft_model(base, BottleneckConfig(reduction_factor=4)).eval()
    assert adapted(model) == DEFAULTS[name]
    for layer in (module for module in model.modules() if isinstance(module, BottleneckLinear)):
        assert layer.bottleneck_adapter["default"].up_proj.weight.shape == (32, 8)
    assert torch.equal(output(model, batch(name)), expected)  # a new adapter is the identity

    calls = []
    for layer in (module for module in model.modules() if isinstance(module, BottleneckLinear)):
        layer.bottleneck_adapter["default"].register_forward_hook(lambda *_: calls.append(1))
        nn.init.normal_(layer.bottleneck_adapter["default"].up_proj.weight)
    assert not torch.allclose(output(model, batch(name)), expected, atol=1e-3)
    assert len(calls) == len(DEFAULTS[name])  # each is run, and run once


def test_adapter_reads_the_projection_before_the_residual(tiny, batch, output):
    """It equals the same model with hooks in the place that Houlsby et al. give."""
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig(init="bert")).eval()
    plain = tiny("bert")
    for name in DEFAULTS["bert"]:
        adapter = model.get_base_model().get_submodule(name).bottleneck_adapter["default"]

        def houlsby(module, inputs, y, adapter=adapter):
            z = nn.functional.linear(y, adapter.down_proj.weight, adapter.down_proj.bias)
            up = nn.functional.linear(
                nn.functional.gelu(z), adapter.up_proj.weight, adapter.up_proj.bias
            )
            return y + up

        plain.get_submodule(name).register_forward_hook(houlsby)
    torch.testing.assert_close(output(model, batch("bert")), output(plain, batch("bert")))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["query", "0.intermediate.dense"]}, 3),
        ({"target_modules": r".*\.layer\.1\..*(query|key)"}, 2),
        ({"target_modules": "all-linear"}, 13),  # 6 a layer and the pooler
        ({"exclude_modules": ["attention.output.dense"]}, 2),
        ({"exclude_modules": r".*layer\.0.*"}, 2),
        ({"layers_to_transform": 1}, 2),
        ({"layers_to_transform": [0], "layers_pattern": "layer"}, 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_targets_can_be_chosen(tiny, batch, output, fields, expected):
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig(**fields))
    assert len(adapted(model)) == expected
    if "layers_to_transform" in fields:
        index = fields["layers_to_transform"]
        index = index if isinstance(index, int) else index[0]
        assert all(f"layer.{index}." in name for name in adapted(model))
    assert torch.equal(output(model, batch("bert")), output(tiny("bert"), batch("bert")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": [1, 7, 9]}, r"without a target: 7, 9.\n.* are in layers 0, 1$"),
        ({"layers_to_transform": 2}, r"without a target: 2.\n.* are in layers 0, 1$"),
        (
            {"layers_to_transform": range(2), "exclude_modules": r".*layer\.0.*"},
            r"without a target: 0.\n.* are in layers 1$",
        ),
        ({"modules_to_save": ["pooler", "nosuch"]}, r"names no module .*: nosuch.\n.*pooler"),
        ({"modules_to_save": ["score"]}, r"names no module of this model: score"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_names_and_numbers_that_the_model_lacks_are_refused(tiny, batch, output, fields, message):
    base = tiny("bert")
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(base, BottleneckConfig(**fields))
    assert not any(isinstance(module, BottleneckLinear) for module in base.modules())
    assert torch.equal(output(base, batch("bert")), output(tiny("bert"), batch("bert")))


def test_heads_that_a_task_may_have_need_not_be_there(tiny):
    """PEFT adds both `classifier` and `score`, of which BERT has the first."""
    config = BottleneckConfig(task_type="SEQ_CLS", modules_to_save=["pooler"])
    model = peft.get_peft_model(tiny("bert-classifier"), config)
    saved = {name for name, p in model.named_parameters() if ".modules_to_save." in name}
    assert len(saved) == 4
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in saved} == {
        "classifier",
        "pooler",
    }


def test_all_linear_reaches_layers_that_have_adapters(tiny):
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig())
    model.add_adapter("wide", BottleneckConfig(target_modules="all-linear"))
    layers = [module for module in model.modules() if isinstance(module, BottleneckLinear)]
    assert sum("wide" in layer.bottleneck_adapter for layer in layers) == 13
    assert sum("default" in layer.bottleneck_adapter for layer in layers) == 4
    assert not any(isinstance(layer.base_layer, BottleneckLinear) for layer in layers)


def test_layers_of_different_width_get_their_own_size(tiny):
    config = BottleneckConfig(target_modules=["o_proj", "up_proj"], reduction_factor=4)
    model = peft.get_peft_model(tiny("llama"), config)
    layer = model.get_base_model().model.layers[0]
    assert layer.self_attn.o_proj.bottleneck_adapter["default"].down_proj.weight.shape == (8, 32)
    assert layer.mlp.up_proj.bottleneck_adapter["default"].down_proj.weight.shape == (16, 64)


def test_unclear_architecture_is_told_how_to_name_layers():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61}
    base = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(ValueError, match="'mamba' has no default") as error:
        peft.get_peft_model(base, BottleneckConfig())
    message = str(error.value)
    assert "no list of modules in it has items with attention" in message
    assert "BottleneckConfig(target_modules=[...])" in message
    assert "backbone.layers.*.mixer.out_proj" in message
    config = BottleneckConfig(target_modules=["mixer.out_proj"])
    assert len(adapted(peft.get_peft_model(base, config))) == 2


def test_model_without_a_configuration_takes_target_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))

        def forward(self, x):
            return self.body(x)

    with pytest.raises(ValueError, match=r"linear layers of this model: body\.\*$"):
        peft.get_peft_model(Net(), BottleneckConfig())
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)
    expected = net(x)
    model = peft.get_peft_model(net, BottleneckConfig(target_modules=["body.0"], bottleneck_size=2))
    assert torch.equal(model(x), expected)
    nn.init.ones_(net.body[0].bottleneck_adapter["default"].up_proj.weight)
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("conv", "conv: Conv2d is no linear layer"),
        ("embedding", "embedding: Embedding is no linear layer"),
        ("out_proj", "encoder.self_attn.out_proj: nn.MultiheadAttention reads"),
        ("linear2", "encoder.linear2: nn.TransformerEncoderLayer reads"),
        ("all-linear", "encoder.self_attn.out_proj: nn.MultiheadAttention reads"),
    ],
)
def test_layers_that_an_adapter_cannot_follow_are_refused(target, message):
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "conv": nn.Conv2d(8, 8, 3),
            "embedding": nn.Embedding(8, 8),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        }
    )
    targets = target if target == "all-linear" else ["linear", target]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(net, BottleneckConfig(target_modules=targets))
    assert type(net["linear"]) is nn.Linear  # nothing was replaced
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_encoder_layer_kept_from_its_fast_path_runs_its_adapters():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.activation_relu_or_gelu = 0
    x = torch.randn(2, 5, 8)
    net = nn.ModuleDict({"layer": layer})
    with torch.no_grad():
        expected = layer(x)
        config = BottleneckConfig(target_modules=["linear2"], bottleneck_size=2)
        peft.get_peft_model(net, config).eval()
        nn.init.normal_(net["layer"].linear2.bottleneck_adapter["default"].up_proj.weight)
        assert not torch.allclose(layer(x), expected)


def test_targets_that_match_nothing_are_an_error(tiny):
    with pytest.raises(ValueError, match="qkv"):
        peft.get_peft_model(tiny("bert"), BottleneckConfig(target_modules=["qkv"]))
