"""Base models that accelerate keeps on the disk: where to find their weights and the adapter's."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkern.integrations.peft.checkpoint import without_adapter_name
from adapterkern.integrations.peft.layer import BottleneckLinear

_BASE = "base_model.model."


def update_offload_index(
    model: PeftModel, index: dict[str, dict[str, str]] | None, weights: Mapping[str, Tensor]
) -> None:
    """Let the index of weights on the disk name this model's parameters, the adapter's included.

    PEFT would write the base weights anew, under LoRA's names. Here they stay in their files, and
    the adapter's go into a folder that lives as long as the model.
    """
    if not index:
        return
    modules = dict(model.named_modules())
    for key in list(index):
        entry = index.pop(key)
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            names = set(file.keys())
        # Files of some models leave out the first part of the name.
        entry["weight_name"] = key if key in names else key.partition(".")[2]
        index[_new_name(modules, _BASE + key)] = entry
    adapter = {}
    for key, parameter in model.named_parameters():
        if parameter.is_meta and key not in index:
            saved = _saved_name(key, list(model.peft_config))
            if saved in weights:
                adapter[key] = weights[saved].detach().cpu().contiguous()
    folder = tempfile.mkdtemp(prefix="adapterkern-offload-")
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    save_file(adapter, path)
    index.update({key: {"safetensors_file": path, "weight_name": key} for key in adapter})


def _new_name(modules: Mapping[str, nn.Module], key: str) -> str:
    """The name of a base parameter whose module, or one above it, has been wrapped."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = modules.get(".".join(parts[:end]))
        if isinstance(module, BottleneckLinear):
            return ".".join([*parts[:end], "base_layer", *parts[end:]])
        if isinstance(module, AuxiliaryTrainingWrapper):
            return ".".join([*parts[:end], "original_module", *parts[end:]])
    return key


def _saved_name(key: str, adapters: list[str]) -> str:
    """The name that a parameter of the adapter, or of a module saved with it, has in its folder."""
    for name in adapters:
        key = without_adapter_name(key, name).replace(f".modules_to_save.{name}.", ".")
    return key
