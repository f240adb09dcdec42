"""The two files of an adapter folder, read as what anybody may have written, and written whole."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from adapterkern.errors import UnsupportedAdapterError
from adapterkern.integrations.adapterhub.contents import MOST_BYTES, entry_problems
from adapterkern.integrations.adapterhub.exchange import written_whole

CONFIG_NAME = "adapter_config.json"
BIN_NAME = "pytorch_adapter.bin"
SAFE_NAME = "adapter.safetensors"
FUSION_NAME = "adapter_fusion_config.json"

_TRIES = 100  # at one folder that others write meanwhile
_Result = TypeVar("_Result")


def read_stable(folder: str, read: Callable[[str], _Result]) -> _Result:
    """Return what `read` makes of a folder, whose files are of one and the same saving.

    Raises:
        ValueError: the folder is written over and over.
        Exception: what `read` raises at a folder that does not change.
    """
    for _ in range(_TRIES):
        before, result, failed = _state_of(folder), None, None
        try:
            result = read(folder)
        except Exception as error:  # raised below, unless the folder was being written
            failed = error
        if _state_of(folder) == before:
            if failed is not None:
                raise failed
            return result  # type: ignore[return-value]
    raise ValueError(f"{folder} changes faster than it can be read.")


def _state_of(folder: str) -> list[tuple | None]:
    found: list[tuple | None] = []
    for name in ("", CONFIG_NAME, SAFE_NAME, BIN_NAME):
        try:
            state = os.stat(os.path.join(folder, name))
        except (OSError, ValueError):
            found.append(None)
        else:
            kept = (state.st_size, state.st_mtime_ns) if name else ()
            found.append((state.st_dev, state.st_ino, *kept))
    return found


def read_config(folder: str) -> dict[str, Any]:
    """Return the configuration file as a dict with a valid name and configuration."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is not a folder.")
    path = os.path.join(folder, CONFIG_NAME)
    if not _is_file(path):
        if os.path.isfile(os.path.join(folder, FUSION_NAME)):
            raise UnsupportedAdapterError(
                f"{folder} holds an AdapterFusion layer, which is no bottleneck adapter (fusion).\n"
                "  hint: load the folders of the adapters that it fuses"
            )
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}, so it is not an adapter's folder.")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        meta = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(meta, dict) or not meta.get("config") or "name" not in meta:
        peft = isinstance(meta, dict) and "peft_type" in meta
        raise ValueError(
            f"{path} was not written by the adapters library: it lacks "
            f"{'a configuration' if isinstance(meta, dict) and 'name' in meta else 'a name'}."
            + (
                "\n  hint: this is a PEFT adapter; peft.PeftModel.from_pretrained loads it"
                if peft
                else ""
            )
        )
    problems = entry_problems(meta)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    return meta


def read_weights(folder: str) -> dict[str, Tensor]:
    """Return the tensors of the file that the library would choose: safetensors, else .bin.

    They lie in the file, not in memory, until they are copied.
    """
    safe, pickled = (os.path.join(folder, name) for name in (SAFE_NAME, BIN_NAME))
    path = safe if _is_file(safe) else pickled
    if not _is_file(path):
        raise FileNotFoundError(
            f"{folder} has a configuration but neither {SAFE_NAME} nor {BIN_NAME}.\n"
            "  hint: copy the whole folder, or save the adapter again"
        )
    read = _safetensors().load_file if path == safe else _read_pickled
    try:
        weights = read(path)
    except Exception as error:  # every format has errors of its own
        why = str(error) or type(error).__name__
        raise ValueError(f"{path} is damaged or not a file of weights: {why}") from error
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(weight, Tensor) for key, weight in weights.items()
    ):
        raise ValueError(f"{path} does not hold a mapping of names to tensors.")
    return dict(weights)


def _is_file(path: str) -> bool:
    """Whether it is there.

    Raises:
        ValueError: something else than a file is: a folder, a pipe, a link to nowhere.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no file, nor a link to one.")
    return os.path.isfile(path)


def _read_pickled(path: str) -> Any:
    if not zipfile.is_zipfile(path):  # as torch wrote before 1.6; no mapping into memory there
        return torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        packed = [
            entry.filename
            for entry in archive.infolist()
            if entry.compress_type != zipfile.ZIP_STORED
        ]
    if packed:  # what is mapped would be read as it lies there
        raise ValueError(f"{packed[0]} in it is compressed, which torch.save does not do")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{SAFE_NAME} needs the safetensors package.\n  hint: pip install safetensors"
        ) from error
    return safetensors.torch


def write(folder: str, meta: dict, weights: dict[str, Tensor], safetensors: bool) -> None:
    """Write both files as one: neither a reader nor a crash meets an old and a new one together."""
    with written_whole(folder, (SAFE_NAME, BIN_NAME, CONFIG_NAME)) as aside:
        with open(Path(aside, CONFIG_NAME), "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=2, sort_keys=True)
        if safetensors:
            # safetensors refuses tensors that share memory, as those of other methods may.
            copies = {key: tensor.clone() for key, tensor in weights.items()}
            _safetensors().save_file(copies, Path(aside, SAFE_NAME))
        else:
            torch.save(weights, Path(aside, BIN_NAME))
