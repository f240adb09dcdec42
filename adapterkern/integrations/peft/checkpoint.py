"""What a folder holds; a model takes all of a folder that fits it, or nothing."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

METHOD = "BOTTLENECK"  # in PEFT, and in adapter_config.json
CONTAINER = "bottleneck_adapter"  # the module of a layer that holds its adapters by name
SHOWN = 4  # problems spelled out in an error; the rest is counted
METADATA_SAVE = "adapterkern_save"  # the number of the save, in the metadata of its weights
METADATA_CONFIG = "adapterkern_config"  # the configuration that these weights were saved with
DTYPES = {  # of adapter weights, as the two formats write them
    *("F64", "F32", "F16", "BF16"),
    *("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"),
}


@dataclass(frozen=True)
class SavedWeights:
    """What the file of weights in a folder says of itself, without its numbers.

    `save` and `settings` are the number of the save and its configuration; None in pickled weights
    and in those that another program wrote.
    """

    folder: str
    shapes: Shapes
    save: str | None = None
    settings: Mapping[str, Any] | None = None


def read_saved_weights(folder: str) -> SavedWeights | None:
    """Read the header of a folder's weights; None if it has no weights.

    Raises:
        ValueError: the file is damaged, or what it holds cannot be an adapter.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    metadata: dict[str, str] = {}
    try:
        if os.path.exists(path):
            with safe_open(path, framework="np") as file:  # "pt" would open the file twice
                slices = {key: file.get_slice(key) for key in list(file.keys())}
                metadata = file.metadata() or {}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {key: part.get_dtype() for key, part in slices.items()}
        elif os.path.exists(path := os.path.join(folder, WEIGHTS_NAME)):
            # On "meta", no number is read and no memory taken.
            pickled = torch.load(path, map_location="meta", weights_only=True)
            shapes = {key: tuple(tensor.shape) for key, tensor in pickled.items()}
            dtypes = {key: str(tensor.dtype) for key, tensor in pickled.items()}
        else:
            return None
        settings = json.loads(metadata[METADATA_CONFIG]) if METADATA_CONFIG in metadata else None
    except Exception as error:  # whatever the readers of two formats make of hostile bytes
        if isinstance(error, SafetensorError | OSError | EOFError):
            why = f"is damaged or cut short: {error}"
        else:
            why = f"cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(
            f"{path} {why}.\n  hint: copy the folder again, or save the adapter again"
        ) from error
    problems = _header_problems(shapes, dtypes)
    if settings is not None and not (
        isinstance(settings, dict) and settings.get("peft_type") == METHOD
    ):
        problems.append(f"its metadata has no configuration of this method but {settings!r:.80}")
    if problems:
        raise ValueError(
            f"{path} holds no adapter of this method:{_listed(problems)}\n"
            "  hint: copy the folder again, or save the adapter again"
        )
    return SavedWeights(folder, shapes, metadata.get(METADATA_SAVE), settings)


def _header_problems(shapes: Shapes, dtypes: Mapping[str, str]) -> list[str]:
    own = [key for key in shapes if f".{CONTAINER}." in key]
    if not own:
        return [f'no key has ".{CONTAINER}." in it ({len(shapes)} keys)']
    return [f"{key} has dtype {dtypes[key]}" for key in own if dtypes[key] not in DTYPES] + [
        f"{key} has shape {list(shapes[key])}" for key in own if 0 in shapes[key]
    ]


def of_one_save(saved: SavedWeights | None, loaded: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The loaded weights, or those of a later save with the settings that were read.

    Raises:
        ValueError: the folder has other settings now, or PEFT has translated the names of these
            weights, so that it is not known which were loaded.
    """
    if saved is None or saved.save is None:
        return loaded
    path = os.path.join(saved.folder, SAFETENSORS_WEIGHTS_NAME)
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        if metadata.get(METADATA_SAVE) == saved.save:
            return loaded  # every save has a new number: it was this file all the time
        with open(path, "rb") as stream:  # for tensors, safe_open opens twice: maybe two saves
            data = stream.read()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        settings = json.loads(header.get("__metadata__", {}).get(METADATA_CONFIG, "{}"))
        if _without_number(settings) == _without_number(saved.settings):
            weights = load(data)
            if weights.keys() == loaded.keys():
                return weights
    except (SafetensorError, OSError, ValueError):
        pass  # gone or damaged, and refused as well
    raise ValueError(
        f"{saved.folder} was saved anew while it was being loaded, and its settings may be others "
        "now.\n  hint: load it again"
    )


def _without_number(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (settings or {}).items() if key != "saved_with"}


def without_adapter_name(key: str, adapter_name: str) -> str:
    """The key of a saved weight, without the adapter's name so that it can be loaded under any."""
    return key.replace(f".{CONTAINER}.{adapter_name}.", f".{CONTAINER}.")


def mismatches(expected: Shapes, found: Shapes) -> list[str]:
    """A sentence for every weight that has another shape, is missing or has no place."""
    shapes = [
        f"{key} is {list(found[key])} in the folder and {list(shape)} in the model"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    missing = [f"{key} is not in the folder" for key in expected if key not in found]
    homeless = [
        f"{key} has no place in the model"
        for key in found
        if f".{CONTAINER}." in key and key not in expected
    ]
    return shapes + missing + homeless


def same_but_for_names(expected: Shapes, found: Shapes) -> bool:
    """Whether the shapes agree as a whole: names may differ that PEFT translates on loading."""
    own = [found[key] for key in found if key in expected or f".{CONTAINER}." in key]
    return Counter(expected.values()) == Counter(own)


def refusal(problems: list[str]) -> ValueError:
    """The error for weights of another model."""
    return ValueError(
        "the saved adapter does not belong to this model; nothing of it was loaded:"
        f"{_listed(problems)}\n"
        "  hint: load the base model it was trained on; adapter_config.json may name it"
    )


def _listed(problems: list[str]) -> str:
    shown = "".join(f"\n  - {problem}" for problem in problems[:SHOWN])
    return shown + (f"\n  - and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
