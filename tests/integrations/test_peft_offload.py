"""Models whose weights accelerate keeps elsewhere until they are needed."""

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig

FIELDS = {
    "plain": {},
    "channel": {"scaling": "channel", "bias": False},
    "parallel": {"placement": "parallel"},
    "saved-module": {"modules_to_save": ["lm_head"], "scaling": "learned"},
}


def randomised(base, **fields):
    model = peft.get_peft_model(base, BottleneckConfig(bottleneck_size=4, **fields)).eval()
    torch.manual_seed(2)
    for key, weight in model.named_parameters():
        if "bottleneck_adapter" in key or "modules_to_save" in key:
            nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.sweep("fields", "name")
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize(("name", "kilobytes"), [("llama", 60), ("gpt2", 200)])
def test_adapter_loads_into_a_model_on_the_disk(
    tiny, batch, output, tmp_path, name, kilobytes, fields
):
    base = tiny(name)
    base.save_pretrained(tmp_path / "base")
    files = {path: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    model = randomised(base, **fields)
    model.save_pretrained(tmp_path / "adapter")
    places = {"device_map": "auto", "max_memory": {"cpu": kilobytes * 1024}}
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", offload_folder=tmp_path / "offload", **places
    )
    loaded = peft.PeftModel.from_pretrained(
        offloaded, tmp_path / "adapter", offload_dir=str(tmp_path / "offload"), **places
    ).eval()
    on_disk = [key for key, weight in loaded.named_parameters() if weight.is_meta]
    assert any("bottleneck_adapter" in key for key in on_disk)
    assert any("base_layer" in key for key in on_disk)
    inputs = batch(name)
    expected = output(model, inputs)
    assert not torch.allclose(expected, output(tiny(name), inputs), atol=1e-2)
    torch.testing.assert_close(output(loaded, inputs), expected)
    torch.testing.assert_close(output(loaded, inputs), expected)  # and once more from the disk
    with loaded.disable_adapter():
        if "modules_to_save" not in fields:
            torch.testing.assert_close(output(loaded, inputs), output(tiny(name), inputs))
    assert {path: path.read_bytes() for path in (tmp_path / "base").iterdir()} == files


@pytest.mark.sweep("fields", "how")
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_adapted_model_can_be_offloaded(tiny, batch, output, tmp_path, how, fields):
    model = randomised(tiny("llama"), **fields)
    inputs = batch("llama")
    expected = output(model, inputs)
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        places = {"base_model.model.lm_head": "cpu", "base_model.model.model": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert all(w.is_meta for key, w in model.named_parameters() if "bottleneck_adapter" in key)
    torch.testing.assert_close(output(model, inputs), expected)
