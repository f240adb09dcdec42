import json

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from random_adapters import randomised
from safetensors.torch import load_file, save_file
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear


@pytest.fixture
def saved(tiny, tmp_path):
    """saved(model, **fields): the folder of a random adapter on that tiny model."""

    def save(model="bert", **fields):
        randomised(tiny(model), **fields).save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def snapshot(model):
    """Return what a refused load must leave alone: modules, weights, trainability."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        {name: weight.clone() for name, weight in model.state_dict().items()},
        {name: weight.requires_grad for name, weight in model.named_parameters()},
        set(getattr(model, "peft_config", ())),
    )


def assert_untouched(model, before):
    modules, weights, trainability, configs = snapshot(model)
    assert modules == before[0]
    assert weights.keys() == before[1].keys()
    assert all(torch.equal(weight, before[1][name]) for name, weight in weights.items())
    assert trainability == before[2]
    assert configs == before[3]


FIELDS = {
    "default": {},
    "no-bias": {"bias": False, "bottleneck_size": 3},
    "learned": {"scaling": "learned", "activation": "relu"},
    "channel": {"scaling": "channel", "target_modules": r".*\.output\.dense"},
    "number": {"scaling": 4.0, "layers_to_transform": 1},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low-memory"])
@pytest.mark.parametrize("name", ["default", "other"])
def test_adapter_survives_saving(tiny, batch, output, tmp_path, fields, name, low_cpu_mem_usage):
    model = randomised(tiny("bert"), **fields)
    expected = output(model, batch("bert"))
    assert not torch.allclose(expected, output(tiny("bert"), batch("bert")), atol=1e-2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"

    loaded = peft.PeftModel.from_pretrained(
        tiny("bert"), tmp_path, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert loaded.active_adapters == [name]
    assert torch.equal(output(loaded, batch("bert")), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_saved_keys_carry_no_adapter_name(tiny, tmp_path):
    model = randomised(tiny("bert"), "french", scaling="learned")
    model.add_adapter("legal", BottleneckConfig())
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "french" / "adapter_model.safetensors"))
    layer = "base_model.model.encoder.layer.1.output.dense.bottleneck_adapter"
    assert {key for key in keys if key.startswith(layer)} == {
        f"{layer}.down_proj.weight",
        f"{layer}.down_proj.bias",
        f"{layer}.up_proj.weight",
        f"{layer}.up_proj.bias",
        f"{layer}.scaling",
    }
    assert len(keys) == 4 * 5
    assert not any("french" in key or "legal" in key for key in keys)
    assert len(load_file(tmp_path / "legal" / "adapter_model.safetensors")) == 4 * 4


def test_adapters_of_one_model_load_into_another(tiny, batch, output, tmp_path):
    model = randomised(tiny("gpt2"), "french")
    model.add_adapter("legal", BottleneckConfig(init="bert", bottleneck_size=9))
    results = {}
    for name in ("french", "legal"):
        model.set_adapter(name)
        results[name] = output(model, batch("gpt2"))
    model.save_pretrained(tmp_path)

    other = peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "legal", "french")
    other.load_adapter(tmp_path / "french", "legal")  # the names change places
    assert torch.equal(output(other, batch("gpt2")), results["legal"])
    other.set_adapter("legal")
    assert torch.equal(output(other, batch("gpt2")), results["french"])


def test_adapter_loaded_for_training_trains(tiny, saved):
    loaded = peft.PeftModel.from_pretrained(tiny("bert"), saved(), is_trainable=True)
    trainable = {name for name, weight in loaded.named_parameters() if weight.requires_grad}
    assert len(trainable) == 16
    assert all("bottleneck_adapter" in name for name in trainable)


def test_saved_modules_come_along(tiny, batch, output, tmp_path):
    model = randomised(tiny("bert-classifier"), task_type="SEQ_CLS")
    expected = output(model, batch("bert"))
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    heads = {key for key in keys if "bottleneck_adapter" not in key}
    assert heads == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    loaded = peft.PeftModel.from_pretrained(tiny("bert-classifier"), tmp_path, "sentiment")
    assert torch.equal(output(loaded, batch("bert")), expected)


def test_auto_model_finds_base_and_adapter(tiny, batch, output, tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    base = type(tiny("bert")).from_pretrained(tmp_path / "base").eval()
    model = randomised(base)
    expected = output(model, batch("bert"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, batch("bert")), expected)


def test_pickled_weights_load_too(tiny, batch, output, tmp_path):
    model = randomised(tiny("bert"))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    loaded = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert torch.equal(output(loaded, batch("bert")), output(model, batch("bert")))


def test_keys_of_a_renamed_model_load_through_a_key_mapping(tiny, batch, output, saved):
    folder = saved()
    expected = output(peft.PeftModel.from_pretrained(tiny("bert"), folder), batch("bert"))
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({key.replace("encoder.layer", "blocks"): weights[key] for key in weights}, path)
    loaded = peft.PeftModel.from_pretrained(
        tiny("bert"), folder, key_mapping={r"^blocks": "encoder.layer"}
    )
    assert torch.equal(output(loaded, batch("bert")), expected)


def test_state_dict_can_be_set_on_a_model_without_a_wrapper(tiny, batch, output):
    model = randomised(tiny("bert"))
    plain = peft.inject_adapter_in_model(BottleneckConfig(), tiny("bert"), "mine")
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model), adapter_name="mine")
    assert torch.equal(output(plain, batch("bert")), output(model, batch("bert")))


# Folders that are refused


def test_missing_folder_is_an_error(tiny, tmp_path):
    base = tiny("bert")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at .*nowhere"):
        peft.PeftModel.from_pretrained(base, str(tmp_path / "nowhere"))
    assert_untouched(base, before)


@pytest.mark.parametrize(
    ("place", "found"),
    [("nowhere", "no such folder"), ("empty", "no adapter_config.json in it")],
)
@pytest.mark.parametrize("subfolder", [None, "french"])
def test_settings_of_a_missing_folder_are_refused_without_asking_the_hub(
    tmp_path, monkeypatch, place, found, subfolder
):
    def asked(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.config.hf_hub_download", asked)
    folder = tmp_path / "empty" / (subfolder or "")
    folder.mkdir(parents=True)
    named = (tmp_path / place / (subfolder or "")).as_posix()
    with pytest.raises(ValueError, match=rf"must be the folder of a saved .*{found}") as caught:
        BottleneckConfig.from_pretrained(str(tmp_path / place), subfolder=subfolder)
    assert str(caught.value).startswith(named)


def without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def cut_short(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"")


def without_one_layer(folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({key: weights[key] for key in weights if "layer.1" not in key}, path)


DAMAGES = {
    without_weights: "has the configuration of a saved adapter but no adapter_model.safetensors",
    cut_short: "adapter_model.safetensors is damaged or cut short",
    empty: "adapter_model.safetensors is damaged or cut short",
    without_one_layer: r"does not belong to this model; nothing of it was loaded:\n"
    r"  - base_model.model.encoder.layer.1.*dense.bottleneck_adapter.*is not in the folder",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("into", ["base", "peft-model"])
def test_incomplete_folder_is_refused_and_the_model_untouched(
    tiny, batch, output, saved, damage, into
):
    folder = saved()
    damage(folder)
    check_refused(tiny("bert"), batch("bert"), output, folder, into, DAMAGES[damage])


def check_refused(base, inputs, output, folder, into, message):
    if into == "base":
        before = snapshot(base)
        with pytest.raises(ValueError, match=message):
            peft.PeftModel.from_pretrained(base, folder)
        assert_untouched(base, before)
        return
    model = randomised(base, "first")
    expected = output(model, inputs)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "second")
    assert_untouched(model, before)
    assert model.active_adapters == ["first"]
    assert torch.equal(output(model, inputs), expected)


OTHERS = {
    "other-width": (
        ("bert", 32, 2),
        ("bert", 48, 2),
        r"layer.0.attention.output.dense.bottleneck_adapter.down_proj.weight is \[2, 32\] in the "
        r"folder and \[3, 48\] in the model",
    ),
    "more-layers": (("bert", 32, 3), ("bert", 32, 2), "layer.2.* has no place in the model"),
    "fewer-layers": (("bert", 32, 2), ("bert", 32, 3), "layer.2.* is not in the folder"),
    "other-architecture": (("gpt2", 32, 2), ("bert", 32, 2), "(?s)Target modules .* not found"),
    "other-head": (
        ("bert-classifier", 32, 2),
        ("roberta-classifier", 32, 2),
        "does not belong to this model.*\n.*roberta.encoder.*is not in the folder",
    ),
}


@pytest.mark.parametrize("into", ["base", "peft-model"])
@pytest.mark.parametrize("case", OTHERS)
def test_folder_of_another_model_is_refused_and_the_model_untouched(
    tiny, batch, output, tmp_path, case, into
):
    trained_on, model, message = OTHERS[case]
    task = {"task_type": "SEQ_CLS"} if case == "other-head" else {}
    randomised(tiny(*trained_on), **task).save_pretrained(tmp_path)
    base = tiny(*model)
    check_refused(base, batch("bert"), output, tmp_path, into, message)


def test_weights_with_other_names_are_refused_before_any_is_copied(tiny, batch, output, tmp_path):
    """Shapes that agree could be translated names, so this is found when PEFT has translated."""
    randomised(tiny("bert-classifier")).save_pretrained(tmp_path)
    base = tiny("roberta-classifier")
    expected = output(base, batch("bert"))
    with pytest.raises(ValueError, match=r"roberta.encoder.*is not in the folder"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(output(base, batch("bert")), expected)


def test_refused_reload_leaves_the_trained_adapter(tiny, batch, output, tmp_path):
    randomised(tiny("bert", 48)).save_pretrained(tmp_path)
    model = randomised(tiny("bert"))
    expected = output(model, batch("bert"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"is \[3, 48\] in the folder and \[2, 32\] in the model"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_untouched(model, before)
    assert torch.equal(output(model, batch("bert")), expected)


def test_head_of_another_size_is_refused_before_any_weight_is_copied(tiny, saved):
    folder = saved("bert-classifier", task_type="SEQ_CLS")
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.classifier.weight"] = torch.zeros(7, 32)
    save_file(weights, path)
    model = randomised(tiny("bert-classifier"), task_type="SEQ_CLS")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"classifier.* is \[7, 32\] in the folder and \[2, 32\]"):
        model.load_adapter(folder, "default")
    assert_untouched(model, before)


def test_settings_of_a_folder_can_be_reused_for_another_model(tiny, saved):
    config = BottleneckConfig.from_pretrained(saved(reduction_factor=8))
    config.inference_mode = False
    model = peft.get_peft_model(tiny("bert", 48), config)
    adapters = [module for module in model.modules() if isinstance(module, BottleneckLinear)]
    assert adapters[0].bottleneck_adapter["default"].bottleneck_size == 6


def test_adapters_of_transformers_own_peft_methods_load_both_ways(tiny, batch, output, tmp_path):
    """`model.add_adapter` puts no PeftModel around the model."""
    model = tiny("bert")
    model.add_adapter(BottleneckConfig(), adapter_name="french")
    torch.manual_seed(2)
    for key, parameter in model.named_parameters():
        if "up_proj" in key:
            nn.init.normal_(parameter)
    expected = output(model, batch("bert"))
    model.save_pretrained(tmp_path)
    assert not any("french" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    other = tiny("bert")
    other.load_adapter(str(tmp_path), adapter_name="legal")
    assert torch.equal(output(other.eval(), batch("bert")), expected)
    wrapped = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert torch.equal(output(wrapped, batch("bert")), expected)
