"""The adapters of a saved folder, for use without PEFT's model, as in `AdapterBanks`."""

import os
from typing import Any

import torch
from peft.utils import load_peft_weights

from adapterkern.integrations.peft.checkpoint import CONTAINER, mismatches, of_one_save
from adapterkern.integrations.peft.config import BottleneckConfig
from adapterkern.modules.bottleneck import BottleneckAdapter

_WRAPPER = "base_model.model."  # what PeftModel puts before the names of the model's modules


class SavedAdapters(dict[str, BottleneckAdapter]):
    """Adapters by the name of the module that they follow or stand beside in the base model."""

    def __init__(self, folder: str, adapters: dict[str, BottleneckAdapter]) -> None:
        super().__init__(adapters)
        self.folder = folder

    def __missing__(self, name: object) -> BottleneckAdapter:
        raise KeyError(f"{self.folder} has no adapter of {name!r}; it has {', '.join(self)}")


def adapters_in(folder: str | os.PathLike[str]) -> SavedAdapters:
    """The adapters that `save_pretrained` of a PEFT model wrote into a folder.

        banks = ak.insert_banks(base_model, after=list(adapters_in(folder)))
        banks.add("french", adapters_in(folder))

    Args:
        folder: of one adapter: the one saved into, or its subfolder of the adapter's name where
            that is not "default".

    Returns:
        `BottleneckAdapter`s on the CPU, in the dtypes of the file, with the activation and scaling
        that were saved, by the names of the base model's modules; a name that is not there is a
        KeyError that lists them. What `modules_to_save` has trained is left out.

    Raises:
        ValueError: it is no folder of a saved adapter of this method, or it is damaged.
    """
    folder = os.path.abspath(folder)  # which cannot be the name of a model on the hub
    config: Any = BottleneckConfig.from_pretrained(folder)
    ours = isinstance(config, BottleneckConfig)
    if not ours or config.saved is None:
        got = "a configuration without weights" if ours else f"one of {config.peft_type.value}"
        raise ValueError(
            f"{folder} must be the folder of a saved bottleneck adapter, got {got}.\n"
            "  hint: save_pretrained writes one, and a subfolder for each adapter that is not "
            'called "default"'
        )
    weights = of_one_save(config.saved, load_peft_weights(folder, device="cpu"))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        module, container, own = key.partition(f".{CONTAINER}.")
        if container:
            found.setdefault(module.removeprefix(_WRAPPER), {})[own] = tensor
    return SavedAdapters(folder, {n: _adapter_of(config, n, t, folder) for n, t in found.items()})


def _adapter_of(
    config: BottleneckConfig, module: str, tensors: dict[str, torch.Tensor], folder: str
) -> BottleneckAdapter:
    down = tensors.get("down_proj.weight")
    hidden_size = 1 if down is None else down.shape[-1]
    adapter = BottleneckAdapter(hidden_size, **config.adapter_arguments(), device="meta")

    def named(own: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        return {f"{module}.{CONTAINER}.{key}": tuple(t.shape) for key, t in own.items()}

    problems = mismatches(named(adapter.state_dict()), named(tensors))
    if problems:
        raise ValueError(
            f"{folder} has weights that do not fit its configuration: {'; '.join(problems[:4])}.\n"
            "  hint: copy the folder again, or save the adapter again"
        )
    adapter.load_state_dict(tensors, assign=True)
    return adapter
