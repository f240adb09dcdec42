"""Folders of AdapterHub in a PEFT model and back, against AdapterHub's own models."""

import copy

import peft
import pytest
import torch
from torch import nn

from adapterkern.integrations.adapterhub import UnsupportedAdapterError
from adapterkern.integrations.peft import (
    BottleneckConfig,
    BottleneckLinear,
    from_adapterhub,
    to_adapterhub,
)

adapters = pytest.importorskip("adapters", reason="it is what the folders are compared with")

MODELS = ["bert", "bert-classifier", "roberta", "distilbert", "gpt2", "llama", "mistral", "qwen2"]
CONFIGS = {
    "houlsby": {},
    "feed-forward": {"mh_adapter": False},
    "attention": {"output_adapter": False},
    "learned": {"scaling": "learned", "non_linearity": "relu"},
    "channel": {"scaling": "channel", "non_linearity": "gelu_new", "reduction_factor": 5},
    "left-out": {"leave_out": [0], "scaling": 0.25, "non_linearity": "leakyrelu"},
    "residual": {"residual_before_ln": False, "non_linearity": "gelu"},
}


def hub_model(base, config):
    """AdapterHub's version of the model with the random adapter "task"."""
    model = copy.deepcopy(base)
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.set_active_adapters("task")
    torch.manual_seed(2)
    for key, weight in model.named_parameters():
        if ".adapters.task." in key:
            nn.init.normal_(weight, std=0.3)
    return model.eval()


def double(**fields):
    return adapters.DoubleSeqBnConfig(**fields)


@pytest.mark.sweep("name", "fields")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_folder_computes_the_same_in_both(tiny, batch, output, tmp_path, name, fields):
    check_both_ways(tiny, batch, output, tmp_path, name, double(**fields))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("fields", [{}, {"scaling": "learned", "leave_out": [1]}], ids=str)
def test_parallel_folder_of_a_post_ln_model_computes_the_same(
    tiny, batch, output, tmp_path, name, fields
):
    check_both_ways(tiny, batch, output, tmp_path, name, adapters.ParBnConfig(**fields))


def check_both_ways(tiny, batch, output, tmp_path, name, config):
    """AdapterHub's model, its folder in PEFT, PEFT's own folder, and back, all give one result."""
    hub = hub_model(tiny(name), config)
    inputs = batch("bert" if name == "bert-classifier" else name)
    expected = output(hub, inputs)
    assert not torch.allclose(expected, output(tiny(name), inputs), atol=5e-4)
    hub.save_adapter(str(tmp_path / "hub"), "task")

    model = from_adapterhub(tiny(name), tmp_path / "hub").eval()
    assert model.active_adapters == ["task"]
    torch.testing.assert_close(output(model, inputs), expected, atol=2e-5, rtol=1e-4)

    model.save_pretrained(tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "peft" / "task")
    torch.testing.assert_close(output(loaded, inputs), expected, atol=2e-5, rtol=1e-4)

    to_adapterhub(model, tmp_path / "back", "task")
    again = tiny(name)
    adapters.init(again)
    again.load_adapter(str(tmp_path / "back"), set_active=True)
    torch.testing.assert_close(output(again.eval(), inputs), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "fields", [{"bias": False, "bottleneck_size": 7}, {"scaling": 0.5}], ids=str
)
def test_adapter_made_here_runs_in_adapterhub(tiny, batch, output, tmp_path, fields):
    """7 is no 32 // factor for 32 / 7 rounded down; without biases zeros stand there."""
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig(activation="silu", **fields)).eval()
    torch.manual_seed(2)
    for key, weight in model.named_parameters():
        if "bottleneck_adapter" in key:
            nn.init.normal_(weight, std=0.3)
    expected = output(model, batch("bert"))
    to_adapterhub(model, tmp_path)
    hub = tiny("bert")
    adapters.init(hub)
    hub.load_adapter(str(tmp_path), set_active=True)
    torch.testing.assert_close(output(hub.eval(), batch("bert")), expected, atol=2e-5, rtol=1e-4)


def test_folder_joins_the_adapters_of_a_model(tiny, batch, output, tmp_path):
    hub = hub_model(tiny("llama"), double())
    hub.save_adapter(str(tmp_path), "task")
    model = peft.get_peft_model(tiny("llama"), BottleneckConfig(), "first").eval()
    assert from_adapterhub(model, tmp_path, "second") is model
    assert model.active_adapters == ["first"]
    model.set_adapter("second")
    torch.testing.assert_close(
        output(model.eval(), batch("llama")), output(hub, batch("llama")), atol=2e-5, rtol=1e-4
    )


OTHERS = {
    "seq_bn": (lambda: adapters.SeqBnConfig(), "seq_bn .original_ln_before.: .* residual stream"),
    "attention": (lambda: adapters.ParBnConfig(mh_adapter=True), "is_parallel beside attention"),
    "plus": (
        lambda: double(original_ln_after=False),
        "original_ln_after=False: the model's own residual add",
    ),
    "inverse": (lambda: double(inv_adapter="nice", inv_adapter_reduction_factor=2), "inv_adapter:"),
    "widths": (
        lambda: double(reduction_factor={"0": 8, "default": 4}),
        r"layers differ in bottleneck_size \(4, 8\)",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_maths_is_refused_by_name(tiny, tmp_path, case):
    config, reason = OTHERS[case]
    hub_model(tiny("bert"), config()).save_adapter(str(tmp_path), "task")
    base = tiny("bert")
    with pytest.raises(UnsupportedAdapterError, match=rf"(?s)cannot become .*{reason}"):
        from_adapterhub(base, tmp_path)
    assert not any(isinstance(module, BottleneckLinear) for module in base.modules())


def test_parallel_adapters_of_a_pre_ln_model_are_refused_both_ways(tiny, tmp_path):
    hub_model(tiny("llama"), adapters.ParBnConfig()).save_adapter(str(tmp_path / "hub"), "task")
    with pytest.raises(UnsupportedAdapterError, match=r"par_bn .is_parallel.: in .* llama"):
        from_adapterhub(tiny("llama"), tmp_path / "hub")
    model = peft.get_peft_model(tiny("llama"), BottleneckConfig(placement="parallel"))
    with pytest.raises(UnsupportedAdapterError, match="AdapterHub's par_bn reads the stream"):
        to_adapterhub(model, tmp_path / "back")


def test_folder_of_another_model_is_refused(tiny, tmp_path):
    hub_model(tiny("bert", 32, 3), double()).save_adapter(str(tmp_path), "task")
    with pytest.raises(ValueError, match=r"layer.2.* of the folder has 0 linear layers in this"):
        from_adapterhub(tiny("bert"), tmp_path)
    with pytest.raises(ValueError, match="trained for a model of type 'bert', not 'llama'"):
        from_adapterhub(tiny("llama"), tmp_path)
    with pytest.raises(UnsupportedAdapterError, match="model type 't5' is none"):
        from_adapterhub(tiny("t5"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"target_modules": ["intermediate.dense"]},
            "adapts .*intermediate.dense, where AdapterHub",
        ),
        ({"modules_to_save": ["pooler"]}, "modules_to_save .* has no place"),
        (
            {"exclude_modules": ["layer.0.output.dense", "layer.1.attention.output.dense"]},
            "is missing",
        ),
    ],
    ids=["targets", "modules", "gap"],
)
def test_adapters_without_a_place_in_adapterhub_are_refused(tiny, tmp_path, fields, reason):
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig(**fields))
    with pytest.raises(ValueError, match=reason):
        to_adapterhub(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"unknown adapter 'x' .this model has default"):
        to_adapterhub(model, tmp_path, "x")
