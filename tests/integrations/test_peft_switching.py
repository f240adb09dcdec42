import copy

import peft
import pytest
import torch
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear


@pytest.fixture
def two(tiny):
    """A model with the adapters "french" and "legal", both far from the identity."""
    model = peft.get_peft_model(tiny("bert"), BottleneckConfig(), "french")
    model.add_adapter("legal", BottleneckConfig(bottleneck_size=5, activation="relu"))
    for name, parameter in model.named_parameters():
        if "up_proj.weight" in name:
            nn.init.normal_(parameter)
    return model.eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, BottleneckLinear)]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_added_adapter_waits_until_it_is_set(two, batch, output):
    inputs = batch("bert")
    assert two.active_adapters == ["french"]
    french = output(two, inputs)
    two.set_adapter("legal")
    legal = output(two, inputs)
    two.set_adapter("french")
    assert torch.equal(output(two, inputs), french)
    assert not torch.allclose(french, legal, atol=1e-2)


def test_only_the_active_adapter_is_trainable(two):
    assert len(trainable(two)) == 16  # 4 layers, two weights and two biases
    assert all(".french." in name for name in trainable(two))
    two.set_adapter("legal")
    assert len(trainable(two)) == 16
    assert all(".legal." in name for name in trainable(two))


@pytest.mark.parametrize("order", [["french", "legal"], ["legal", "french"]])
@pytest.mark.parametrize("through", ["PeftModel", "tuner"])
def test_list_of_adapters_is_stacked_in_its_order(two, tiny, batch, output, order, through):
    (two if through == "PeftModel" else two.base_model).set_adapter(order)
    assert two.active_adapters == order
    plain = tiny("bert")
    for name, layer in two.get_base_model().named_modules():
        if isinstance(layer, BottleneckLinear):
            first, second = (layer.bottleneck_adapter[one] for one in order)
            plain.get_submodule(name).register_forward_hook(
                lambda module, inputs, y, first=first, second=second: second(first(y))
            )
    assert torch.equal(output(two, batch("bert")), output(plain, batch("bert")))
    assert len(trainable(two)) == 32


def test_stack_goes_through_every_method_of_the_model(two, batch, output, tmp_path):
    two.set_adapter(["french", "legal"])
    stacked = output(two, batch("bert"))
    with two.disable_adapter():
        assert not torch.allclose(output(two, batch("bert")), stacked)
    assert torch.equal(output(two, batch("bert")), stacked)
    two.save_pretrained(tmp_path)
    two.add_adapter("third", BottleneckConfig())
    assert two.active_adapters == ["french", "legal"]
    assert torch.equal(output(two, batch("bert")), stacked)
    two.set_adapter(["third", "french", "legal"])
    two.delete_adapter("third")
    assert two.active_adapters == ["french", "legal"]
    assert torch.equal(output(two, batch("bert")), stacked)


def test_a_tuple_stacks_as_a_list_does(two, batch, output):
    two.set_adapter(["legal", "french"])
    stacked = output(two, batch("bert"))
    two.set_adapter("french")
    two.set_adapter(("legal", "french"))
    assert two.active_adapters == ["legal", "french"]
    assert two.active_peft_config is two.peft_config["legal"]
    assert torch.equal(output(two, batch("bert")), stacked)
    with pytest.raises(ValueError, match="not found"):
        two.set_adapter(("legal", "english"))
    two.delete_adapter("legal")
    assert two.active_adapters == ["french"]


def test_disabled_adapters_leave_the_base_model(two, tiny, batch, output):
    adapted = output(two, batch("bert"))
    with two.disable_adapter():
        assert torch.equal(output(two, batch("bert")), output(tiny("bert"), batch("bert")))
        assert trainable(two) == set()
    assert torch.equal(output(two, batch("bert")), adapted)
    assert len(trainable(two)) == 16


def test_deleted_adapter_is_gone(two, batch, output):
    two.set_adapter("legal")
    legal = output(two, batch("bert"))
    two.set_adapter("french")
    with pytest.warns(UserWarning, match="Setting active adapter to legal"):
        two.delete_adapter("french")
    assert two.active_adapters == ["legal"]
    assert set(two.peft_config) == {"legal"}
    assert not any("french" in name for name, _ in two.named_parameters())
    assert torch.equal(output(two, batch("bert")), legal)
    two.add_adapter("french", BottleneckConfig())  # the name is free again
    two.set_adapter(["legal", "french"])
    assert torch.equal(output(two, batch("bert")), legal)


@pytest.mark.parametrize("names", ["english", ["french", "english"], []])
def test_unknown_adapters_are_refused_and_nothing_changes(two, names):
    with pytest.raises(ValueError, match="not found"):
        two.set_adapter(names)
    if names:
        with pytest.raises(ValueError, match=r"unknown adapters: english .this model has french"):
            two.base_model.set_adapter(names)
    assert two.active_adapters == ["french"]


@pytest.mark.parametrize(
    "name",
    [
        "output",
        "encoder",
        "down_proj",
        "weight",
        "a.b",
        "type",
        "",
        "__base__",
        "a/b",
        "a\\b",
        "../x",
    ],
)
def test_names_that_peft_would_mix_up_are_refused(two, name):
    with pytest.raises(ValueError, match=r"cannot name an adapter.*\n.*choose another"):
        two.add_adapter(name, BottleneckConfig())
    assert set(two.peft_config) == {"french", "legal"}


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.merge_and_unload(),
        lambda model: layers(model)[0].merge(),
        lambda model: layers(model)[0].unmerge(),
    ],
    ids=["merge_adapter", "unmerge_adapter", "merge_and_unload", "layer-merge", "layer-unmerge"],
)
def test_merge_is_refused_with_the_reason(two, batch, output, merge):
    before = output(two, batch("bert"))
    with pytest.raises(ValueError, match="cannot be merged or unmerged: they are nonlinear"):
        merge(two)
    assert torch.equal(output(two, batch("bert")), before)


def test_unload_gives_the_base_model_back(two, tiny, batch, output):
    base = two.unload()
    assert not layers(base)
    assert base.state_dict().keys() == tiny("bert").state_dict().keys()
    assert torch.equal(output(base, batch("bert")), output(tiny("bert"), batch("bert")))


def test_status_and_parameter_count_are_right(two, capsys):
    status = two.get_model_status()
    assert (status.peft_types, status.enabled) == (
        {"french": "BOTTLENECK", "legal": "BOTTLENECK"},
        True,
    )
    assert status.available_adapters == ["french", "legal"]
    assert status.num_adapter_layers == 4
    two.print_trainable_parameters()
    french = 4 * (2 * 32 * 2 + 2 + 32)  # R = 32 // 16
    assert f"trainable params: {french:,} ||" in capsys.readouterr().out


def test_copy_is_the_same_and_separate(two, batch, output):
    twin = copy.deepcopy(two)
    before = output(two, batch("bert"))
    assert torch.equal(output(twin, batch("bert")), before)
    twin.set_adapter(["legal", "french"])
    nn.init.zeros_(layers(twin)[0].bottleneck_adapter["french"].up_proj.weight)
    assert two.active_adapters == ["french"]
    assert torch.equal(output(two, batch("bert")), before)
