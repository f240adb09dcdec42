"""Adapter folders of the `adapters` library, read and written without it.

A folder holds `adapter_config.json` and the weights, in `pytorch_adapter.bin` or
`adapter.safetensors`. A weight is called `<layer>.adapters.<name>.<parameter>`, where the layer is
a module of the base model, with or without the model's prefix ("bert.").
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from adapterkern.activations import canonical_name
from adapterkern.errors import UnsupportedAdapterError
from adapterkern.integrations.adapterhub.configs import Config, activation_of, is_union, resolve
from adapterkern.integrations.adapterhub.contents import (
    problems_of,
    renamed,
    tensor_problems,
    unwritable,
    wrong_kinds,
)
from adapterkern.integrations.adapterhub.files import (
    read_config,
    read_stable,
    read_weights,
    write,
)
from adapterkern.integrations.foreign.conversion import adapter_from_tensors
from adapterkern.modules.bottleneck import BottleneckAdapter, is_linear

_LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
_PARAMETERS = {
    "adapter_down.0.weight": "down_weight",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
    "scaling": "scaling",
}
_MOST_SHOWN = 20  # problems in an error
_VERSION = "adapters.1.3.0"  # of the format that `save` writes


@dataclass
class AdapterCheckpoint:
    """A saved bottleneck adapter.

    Attributes:
        name: the adapter's name; `save` writes all weights under it.
        layers: the layer's name in the base model, as saved, to its adapter.
        config: the bottleneck configuration with all defaults, under the library's field names; the
            first one of a union. It describes `layers`; nothing else tells how a layer uses its
            adapter (`is_parallel`, `original_ln_before`, ...).
        saved_config: the configuration as saved.
        metadata: the file's other entries: model_type, hidden_size, version, ...
        other_weights: the weights of invertible adapters and of the other methods of a union,
            kept for `save`.
        saved_name: the adapter's name in the keys of `other_weights`, if it is not `name`.
    """

    name: str
    layers: dict[str, BottleneckAdapter]
    config: Any
    saved_config: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    other_weights: dict[str, Tensor] = field(default_factory=dict)
    saved_name: str | None = None


def load(
    folder: str | os.PathLike, *, model_type: str | None = None, num_layers: int | None = None
) -> AdapterCheckpoint:
    """Read an adapter folder, whatever version of the library wrote it.

    Gaps are refused: a tensor, a layer, or all layers of a location that the configuration names.
    A folder does not tell how many layers the model has: without `num_layers` nothing is said if
    the last ones are missing in all locations, or the whole encoder beside a decoder.

    Args:
        folder: a local folder as `save_adapter` writes it.
        model_type: refuse a folder whose base model has another type, such as "bert".
        num_layers: refuse a folder with another number of layers (in encoder and decoder each),
            not counting those that its configuration leaves out.

    Raises:
        FileNotFoundError: the folder, its configuration or its weights are missing.
        ValueError: a file is damaged or not one of the library, weights are missing, left over or
            of another shape than the configuration says or no plain floating-point tensors, or
            `model_type` differs; the message names the folder and all that is wrong. Sizes are
            compared before anything of them is allocated, and no code of a file is run.
        UnsupportedAdapterError: a Compacter, gated, fusion or layer-normed adapter, or another
            method altogether.
    """
    folder = os.fsdecode(folder)
    return read_stable(folder, lambda folder: _load(folder, model_type, num_layers))


def adapters_in(
    folder: str | os.PathLike, *, model_type: str | None = None, num_layers: int | None = None
) -> dict[str, BottleneckAdapter]:
    """The adapters in a folder by the place of each in its base model, ready for `AdapterBank.add`.

    `load` takes the same arguments and raises the same errors; it also tells how a layer uses its
    adapter, which a bank leaves to the caller.
    """
    return load(folder, model_type=model_type, num_layers=num_layers).layers


def _load(folder: str, model_type: str | None, num_layers: int | None) -> AdapterCheckpoint:
    meta = read_config(folder)
    if model_type is not None and meta.get("model_type") not in (None, model_type):
        raise ValueError(
            f"{folder} was trained for a model of type {meta['model_type']!r}, not {model_type!r}."
        )
    try:
        configs = resolve(meta["config"], versioned="version" in meta)
    except (UnsupportedAdapterError, ValueError) as error:
        raise type(error)(f"{folder}: {error}") from None
    layers, other = _sort_weights(read_weights(folder), meta["name"])
    problems = tensor_problems(layers, other)
    problems = problems or problems_of(layers, configs, meta.get("hidden_size"), num_layers)
    if problems:
        raise ValueError(
            f"{folder} is incomplete or does not fit its configuration:{_listed(problems)}"
        )
    config = configs[0]
    built = {
        layer: _adapter({name: _own(tensor) for name, tensor in tensors.items()}, config)
        for layer, tensors in layers.items()
    }
    other = {key: _own(tensor) for key, tensor in other.items()}
    rest = {key: value for key, value in meta.items() if key not in ("config", "name")}
    name = meta["name"]
    return AdapterCheckpoint(name, built, config, meta["config"], rest, other, saved_name=name)


def _own(tensor: Tensor) -> Tensor:
    """A plain copy in memory: the file may change or go."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _listed(problems: list[str]) -> str:
    shown = [f"\n  - {problem}" for problem in islice(problems, _MOST_SHOWN)]
    left = len(problems) - len(shown)
    return "".join(shown) + (f"\n  - and {left} more" if left else "")


def save(
    checkpoint: AdapterCheckpoint, folder: str | os.PathLike, *, safetensors: bool = False
) -> None:
    """Write an adapter folder that the library's `load_adapter` reads.

    The folder is created where it does not exist. An old adapter in it is replaced in one step on
    Linux: a reader, and who comes after a crash, finds the whole old adapter or the whole new one.
    Elsewhere, and where the folder's parent may not be written, there may be no configuration for
    a moment, but never a mixture. Other files in the folder stay.

    Args:
        checkpoint: from `load`, or made by hand: `config` may then also be the name of a preset or
            a union, and `metadata` should hold model_type and hidden_size.
        folder: where to write.
        safetensors: write adapter.safetensors instead of pytorch_adapter.bin; the library reads it
            with `load_adapter(folder, use_safetensors=True)`.

    Raises:
        TypeError: the checkpoint or a part of it has a wrong type; nothing was written.
        ValueError: the adapters do not fit the configuration, the library would not load the name
            or would lose some of `other_weights`; nothing was written.
        UnsupportedAdapterError: as `load`; nothing was written.
        FileExistsError: `folder` is a file; nothing was written.
        ImportError: `safetensors` is asked for and not installed; nothing was written.
    """
    folder = os.fsdecode(folder)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise FileExistsError(f"{folder} is a file; save needs a folder, new or old.")
    _refuse_kinds(checkpoint)
    union = _union_of(checkpoint)
    configs = resolve(_plain(checkpoint.config) if union is None else union, versioned=True)
    meta = {
        "version": _VERSION,
        **checkpoint.metadata,
        "name": checkpoint.name,
        "config": configs[0] if union is None else union,
    }
    layers = {layer: _tensors(adapter) for layer, adapter in checkpoint.layers.items()}
    other, problems = renamed(checkpoint.other_weights, checkpoint.saved_name, checkpoint.name)
    problems += unwritable(meta) or problems_of(layers, configs, meta.get("hidden_size"))
    for layer, adapter in checkpoint.layers.items():
        problems += [f"{layer} {problem}" for problem in _option_problems(adapter, configs[0])]
        for name in ("down_proj", "up_proj"):
            if not is_linear(projection := getattr(adapter, name)):
                kind = type(projection).__name__
                problems.append(
                    f"{layer} has a {kind} as its {name}, whose weights are not all of it"
                )
    problems += _union_problems(_plain(checkpoint.config), configs) if union is not None else []
    weights = {
        f"{layer}.adapters.{checkpoint.name}.{key}": tensors[parameter]
        for layer, tensors in layers.items()
        for key, parameter in _PARAMETERS.items()
        if parameter in tensors
    }
    problems += tensor_problems(layers, other)
    if problems:
        raise ValueError(
            f"the checkpoint does not fit its configuration or a folder:{_listed(problems)}"
        )
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    write(folder, meta, {**weights, **other}, safetensors)


def _refuse_kinds(checkpoint: AdapterCheckpoint) -> None:
    if not isinstance(checkpoint, AdapterCheckpoint):
        raise TypeError(
            f"save needs an AdapterCheckpoint, got a {type(checkpoint).__name__}.\n"
            "  hint: load returns one; AdapterCheckpoint(name, layers, config) makes one by hand"
        )
    entries = {
        "config": _plain(checkpoint.config),
        "saved_config": _plain(checkpoint.saved_config),
        "metadata": checkpoint.metadata,
    }
    problems = wrong_kinds(checkpoint.name, checkpoint.layers, checkpoint.other_weights, entries)
    if problems:
        raise TypeError(
            f"the checkpoint has parts that no folder can hold:{_listed(problems)}\n"
            "  hint: layers are BottleneckAdapters, other_weights tensors, the rest what JSON holds"
        )


def _plain(config: Any) -> Any:
    """Turn a configuration object of the library into a dict; leave anything else unchanged."""
    return config.to_dict() if hasattr(config, "to_dict") else config


def _union_of(checkpoint: AdapterCheckpoint) -> Any:
    """The union to write, if any; `config` may be only its first bottleneck configuration."""
    both = (_plain(config) for config in (checkpoint.config, checkpoint.saved_config))
    return next((config for config in both if is_union(config)), None)


def _union_problems(config: Any, configs: list[Config]) -> list[str]:
    """Changes of `config` that would be lost, because the union is written in its place."""
    if is_union(config):
        return []
    (found, *_) = resolve(config, versioned=True)
    changed = [key for key in found if found[key] != configs[0].get(key)]
    return [
        f"{key} is {found[key]!r} in config, {configs[0].get(key)!r} in the union of saved_config, "
        "which is what a folder holds"
        for key in changed
    ]


def _sort_weights(
    weights: dict[str, Tensor], name: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort tensors by layer and parameter, and set those of other methods aside, renamed."""
    layers: dict[str, dict[str, Tensor]] = {}
    other: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        for old, new in _LEGACY.items():  # with the name, which may equal a legacy module's
            key = key.replace(f"{old}.{name}.", f"{new}.{name}.")
        layer, found, parameter = key.partition(f".adapters.{name}.")
        if found:
            layers.setdefault(layer, {})[_PARAMETERS.get(parameter, parameter)] = tensor
        else:
            other[key] = tensor
    return layers, other


def _option_problems(adapter: BottleneckAdapter, config: Config) -> list[str]:
    """Differences in the options, which a folder keeps in its configuration alone."""
    wanted: dict[str, Any] = {
        "activation": canonical_name(activation_of(config)),
        "dropout": config["dropout"],
    }
    if not isinstance(config["scaling"], str):
        wanted["scaling"] = config["scaling"]
    return [
        f"has the {name} {found}, the configuration {value}"
        for name, value in wanted.items()
        if not isinstance(found := getattr(adapter, name), Tensor) and found != value
    ]


def _adapter(tensors: Mapping[str, Tensor], config: Config) -> BottleneckAdapter:
    return adapter_from_tensors(
        **{"scaling": config["scaling"], **tensors},
        activation=activation_of(config),
        dropout=config["dropout"],
    )


def _tensors(adapter: BottleneckAdapter) -> dict[str, Tensor]:
    found = {
        "down_weight": adapter.down_proj.weight,
        "down_bias": adapter.down_proj.bias,
        "up_weight": adapter.up_proj.weight,
        "up_bias": adapter.up_proj.bias,
        "scaling": adapter.scaling if isinstance(adapter.scaling, Tensor) else None,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}
