import dataclasses
import json

import peft
import pytest

from adapterkern.integrations.peft import BottleneckConfig

FILLED = {
    "target_modules": ["output.dense"],
    "exclude_modules": ["layer.0.output.dense"],
    "bottleneck_size": 5,
    "activation": "relu",
    "bias": False,
    "scaling": "learned",
    "dropout": 0.25,
    "init": "houlsby",
    "layers_to_transform": [1],
    "layers_pattern": ["layer"],
    "modules_to_save": ["pooler"],
}


def test_config_default_is_reduction_factor_16():
    config = BottleneckConfig()
    assert (config.bottleneck_size, config.reduction_factor) == (None, 16)
    assert BottleneckConfig(bottleneck_size=8).reduction_factor is None


@pytest.mark.parametrize("fields", [FILLED, {"reduction_factor": 2.5, "scaling": 0.5}])
@pytest.mark.parametrize("loader", [peft.PeftConfig, BottleneckConfig])
def test_config_survives_saving(tmp_path, fields, loader):
    config = BottleneckConfig(**fields, task_type="SEQ_CLS", inference_mode=False)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is BottleneckConfig
    assert dataclasses.asdict(loaded) == dataclasses.asdict(config)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"


def test_config_is_written_in_one_step(tmp_path, monkeypatch):
    BottleneckConfig(bottleneck_size=3).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_text()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("adapterkern.integrations.peft.saving.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        BottleneckConfig(bottleneck_size=4).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_config_file_does_not_depend_on_set_order(tmp_path):
    names = [f"layer{index}" for index in range(20)]
    BottleneckConfig(target_modules=set(names)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"bottleneck_size": 8, "reduction_factor": 16},
            "bottleneck_size .8. and reduction_factor",
        ),
        ({"bottleneck_size": 0}, "bottleneck_size must be at least 1"),
        ({"reduction_factor": 0}, "reduction_factor must be positive, got 0"),
        ({"activation": "prelu"}, "prelu"),
        ({"bias": "none"}, "True or False, got 'none'"),
        ({"scaling": "loud"}, "scaling must be"),
        ({"scaling": float("nan")}, "scaling must be finite, got nan"),
        ({"target_modules": "(("}, r"target_modules='\(\(' is no regular expression"),
        ({"dropout": 1.5}, "dropout"),
        ({"init": "zeros"}, "unknown init 'zeros'"),
        ({"target_modules": "x.*", "layers_to_transform": 0}, "target_modules as a list"),
        ({"layers_pattern": "h"}, "set layers_to_transform"),
        ({"layers_to_transform": range(0)}, "layers_to_transform is empty"),
        ({"task_type": "POETRY"}, "POETRY"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_refuses_bad_values_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottleneck_size": 2.5}, "bottleneck_size must be an integer, got 2.5"),
        ({"reduction_factor": "16"}, "reduction_factor must be a number, got '16'"),
        ({"dropout": "x"}, r"dropout must be a number in \[0, 1\), got 'x'"),
        ({"activation": ["gelu"]}, r"activation must be a name, .* got \['gelu'\]"),
        ({"modules_to_save": "pooler"}, "modules_to_save must be a list, got 'pooler'"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be the number .* got '1'"),
        ({"layers_to_transform": [0, 1.0]}, r"layers_to_transform must .* got \[0, 1.0\]"),
        ({"layers_to_transform": -1}, "layers_to_transform must .* counted from 0, .* got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_refuses_another_type_at_once(fields, message):
    with pytest.raises(TypeError, match=message):
        BottleneckConfig(**fields)


@pytest.mark.parametrize("layers", [1, [1], (1,), range(1, 2), {1}], ids=str)
def test_layers_to_transform_become_a_list_that_can_be_saved(tmp_path, layers):
    config = BottleneckConfig(layers_to_transform=layers)
    assert config.layers_to_transform == [1]
    config.save_pretrained(tmp_path)
    assert BottleneckConfig.from_pretrained(tmp_path).layers_to_transform == [1]


def test_registration_keeps_to_itself():
    """PEFT's own methods keep working, and the plug-in's method is found under a plain string."""
    assert peft.get_peft_config({"peft_type": "BOTTLENECK"}) == BottleneckConfig()
    assert type(peft.get_peft_config({"peft_type": "LORA"})) is peft.LoraConfig
    assert "BOTTLENECK" not in peft.PeftType.__members__
