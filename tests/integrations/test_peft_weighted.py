"""Adapters made of others, and what of LoRA's interface has no equivalent."""

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear

PAIRS = {
    "equal": ({}, {}),
    "widths": ({"bottleneck_size": 3}, {"reduction_factor": 8}),
    "scalings": ({"scaling": "channel"}, {"scaling": 0.3}),
    "learned": ({"scaling": "learned", "bias": False}, {"scaling": "learned"}),
    "layers": ({"layers_to_transform": [0]}, {"target_modules": ["output.dense"]}),
    "without-bias": ({"bias": False}, {"bias": False}),
    "hidden-sizes": ({"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}, {}),
}


def pair(base, first, second):
    """A model with two random adapters, "a" and "b"."""
    model = peft.get_peft_model(base, BottleneckConfig(**first), "a")
    model.add_adapter("b", BottleneckConfig(**second))
    torch.manual_seed(2)
    for key, weight in model.named_parameters():
        if "bottleneck_adapter" in key:
            nn.init.normal_(weight, std=0.3)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, BottleneckLinear)]


def added(layer, y, name):
    """What an adapter of a layer adds to y."""
    return layer.bottleneck_adapter[name](y) - y if name in layer.bottleneck_adapter else 0.0


@pytest.mark.parametrize("fields", PAIRS.values(), ids=PAIRS)
def test_cat_adds_exactly_the_weighted_sum_of_what_each_adds(tiny, fields):
    model = pair(tiny("bert"), *fields).double()
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "both", "cat")
    for layer in layers_of(model):
        size = layer.base_layer.out_features
        y = torch.randn(5, size, dtype=torch.float64)
        expected = 0.7 * added(layer, y, "a") - 1.5 * added(layer, y, "b")
        torch.testing.assert_close(added(layer, y, "both"), expected)
        assert expected.abs().max() > 0.1
        assert not any(w.requires_grad for w in layer.bottleneck_adapter["both"].parameters())


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_combined_adapter_is_saved_and_loads(tiny, batch, output, tmp_path, combination):
    model = pair(tiny("bert"), {"bottleneck_size": 3}, {"bottleneck_size": 3})
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination)
    model.set_adapter("both")
    expected = output(model, batch("bert"))
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path / "both")
    assert torch.equal(output(loaded, batch("bert")), expected)
    width = loaded.peft_config["default"].bottleneck_size
    assert width == {"cat": 6, "linear": 3}[combination]


def test_linear_adds_the_parameters(tiny):
    model = pair(tiny("bert"), {"scaling": "channel"}, {"scaling": "channel"})
    model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "mean", "linear")
    for layer in layers_of(model):
        a, b, mean = (
            dict(layer.bottleneck_adapter[n].named_parameters()) for n in ("a", "b", "mean")
        )
        assert (
            a.keys()
            == mean.keys()
            == {
                *("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias", "scaling")
            }
        )
        for key in a:
            torch.testing.assert_close(mean[key], 0.25 * a[key] + 0.75 * b[key])


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_one_adapter_and_a_weight_is_the_adapter_rescaled(tiny, batch, output, placement):
    model = pair(tiny("bert"), {"layers_to_transform": [1], "placement": placement}, {})
    model.add_weighted_adapter(["a"], [0.0], "none")
    model.add_weighted_adapter(["a"], [1.0], "same")
    model.set_adapter("none")
    assert torch.equal(output(model, batch("bert")), output(tiny("bert"), batch("bert")))
    model.set_adapter("same")
    same = output(model, batch("bert"))
    model.set_adapter("a")
    assert torch.equal(output(model, batch("bert")), same)


@pytest.mark.parametrize(
    ("fields", "combination", "reason"),
    [
        (({"activation": "relu"}, {}), "cat", "activation is not the same: relu, gelu"),
        (({"placement": "parallel"}, {}), "cat", "placement is not the same: parallel, houlsby"),
        (({"dropout": 0.1}, {}), "cat", "dropout is not the same: 0.1, 0.0"),
        (({"modules_to_save": ["pooler"]}, {}), "cat", "modules_to_save of a: whole modules"),
        (({"bottleneck_size": 3}, {"bottleneck_size": 4}), "linear", "bottleneck_size is not the"),
        (({"scaling": 2.0}, {}), "linear", "scaling is not the same: 2.0, 1.0"),
        (({"bias": False}, {}), "linear", "bias is not the same: False, True"),
        (
            ({"layers_to_transform": [1]}, {}),
            "linear",
            "layer.0.* is adapted by some of them alone",
        ),
        (({}, {}), "svd", "combination_type must be one of cat, linear, got 'svd'"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_adapters_that_have_no_combination_are_refused(tiny, fields, combination, reason):
    model = pair(tiny("bert"), *fields)
    with pytest.raises(ValueError, match=rf"(?s){reason}.*\n  hint: "):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination)
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "reason"),
    [
        (["a", "c"], [1, 1], "both", r"unknown adapters: c .this model has a, b"),
        (["a", "b"], [1], "both", "got 2 adapters and 1 weights"),
        ([], [], "both", "got 0 adapters"),
        (["a", "b"], [1, 1], "b", "already has an adapter 'b'"),
        (["a", "b"], [1, 1], "a.b", "cannot name an adapter"),
    ],
)
def test_wrong_arguments_are_refused(tiny, adapters, weights, name, reason):
    model = pair(tiny("bert"), {}, {})
    with pytest.raises(ValueError, match=reason):
        model.add_weighted_adapter(adapters, weights, name)
    assert list(model.peft_config) == ["a", "b"]
    assert all(set(layer.bottleneck_adapter) == {"a", "b"} for layer in layers_of(model))


# LoRA


def test_lora_below_the_adapters_works(tiny, batch, output):
    """The way to have both: LoRA changes the layer, the adapter follows what it gives."""
    lora = peft.LoraConfig(target_modules=["output.dense"], init_lora_weights=False)
    torch.manual_seed(5)
    below = peft.inject_adapter_in_model(lora, tiny("bert"), "low").eval()
    with_lora = output(below, batch("bert"))
    assert not torch.allclose(with_lora, output(tiny("bert"), batch("bert")), atol=1e-3)
    model = peft.get_peft_model(below, BottleneckConfig(), "high").eval()
    assert torch.equal(output(model, batch("bert")), with_lora)  # the identity at first
    layer = layers_of(model)[0]
    assert type(layer.base_layer).__module__.startswith("peft.tuners.lora")
    nn.init.normal_(layer.bottleneck_adapter["high"].up_proj.weight)
    x = torch.randn(3, layer.base_layer.in_features)
    torch.testing.assert_close(layer(x), layer.bottleneck_adapter["high"](layer.base_layer(x)))
    model.add_adapter("higher", BottleneckConfig())
    model.base_model.set_adapter(["high", "higher"])
    assert model.base_model.active_adapters == ["high", "higher"]
    model.set_adapter("higher")
    assert model.active_adapter == "higher"


def test_mixed_models_are_refused_by_name(tiny, tmp_path):
    with pytest.raises(
        ValueError, match="'BOTTLENECK' is not compatible with the `PeftMixedModel`"
    ):
        peft.get_peft_model(tiny("bert"), BottleneckConfig(), mixed=True)
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig())
    with pytest.raises(ValueError, match=r"different peft types. Found .*BOTTLENECK.*LORA"):
        model.add_adapter("low", peft.LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BOTTLENECK is not supported for mixed models"):
        peft.PeftMixedModel.from_pretrained(tiny("bert"), tmp_path)


def test_scale_of_lora_is_refused(tiny):
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig())
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 0.5),
    ):
        pass
