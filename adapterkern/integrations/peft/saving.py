"""A save exchanges a folder's adapter in one step, whenever it is stopped and whoever reads along.

PEFT writes file by file, so it writes into a folder of its own, `.saving-*`, from which the files
move into place by renames. One of these decides: that of the weights, which carry the configuration
they were saved with in their metadata. Every save has a number, in the weights and in
`adapter_config.json`; a reader that finds two numbers takes the configuration of the weights. So at
every instant the folder holds the old adapter or the new one, whole, and a process that is killed
leaves one of them (none where there was none).

What cannot be had:
- A reader opens the configuration and later the weights. If the folder is saved in between with
  other settings, loading is refused and must be repeated; with the same settings it takes the
  later weights (with modules_to_save or a key mapping, which rename them, it is refused too).
- safetensors opens a file twice. If weights of other sizes take its place in between, PEFT's
  loading ends with the RuntimeError of safetensors, and must be repeated too.
- Each adapter of a model is exchanged on its own, not all of them at once.
- Pickled weights have no metadata: a reader may meet the weights of the next save with the settings
  of the last one, if they have the same shapes.
- Over an adapter of another method, of which a reader could not tell that its weights are gone,
  there is an instant without a configuration.
- Files are not forced onto the disk: a power failure is another matter than a kill.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkern.integrations.peft.checkpoint import (
    METADATA_CONFIG,
    METADATA_SAVE,
    METHOD,
    read_saved_weights,
)
from adapterkern.integrations.peft.model_card import MODEL_CARD
from adapterkern.integrations.staging import STAGE, lock, stage_in, sweep

PATIENCE_SECONDS = 5.0  # for another writer's renames, which take milliseconds


@contextmanager
def staged(folder: str) -> Iterator[str]:
    """Yield a folder to save into; its files move into `folder` when the block ends without error.

    What a killed process left behind in `folder` is removed first. Within such a folder, nobody
    reads along, and the files are written in place.
    """
    if any(part.startswith(STAGE) for part in os.path.abspath(folder).split(os.sep)):
        yield folder
        return
    os.makedirs(folder, exist_ok=True)
    sweep(os.path.join(folder, name) for name in os.listdir(folder) if name.startswith(STAGE))
    with stage_in(folder) as fresh:
        if os.path.isfile(os.path.join(folder, MODEL_CARD)):  # PEFT extends a card that exists
            shutil.copy(os.path.join(folder, MODEL_CARD), fresh)
        yield fresh
        for source, _, names in os.walk(fresh):
            if CONFIG_NAME in names:
                _number(source, os.path.join(folder, os.path.relpath(source, fresh)))
        _exchange(fresh, folder)


def _number(source: str, target: str) -> None:
    """Give a staged adapter the number of its save, and its weights a copy of its settings.

    A configuration on its own takes the number of the weights that it comes to lie beside.
    """
    path = os.path.join(source, CONFIG_NAME)
    with open(path) as file:
        settings = json.load(file)
    weights = os.path.join(source, SAFETENSORS_WEIGHTS_NAME)
    tensors, number = _staged_weights(source), uuid.uuid4().hex
    if tensors is None:
        number = _number_of(target) or number
    settings["saved_with"] = {**settings["saved_with"], "save": number}
    if tensors is not None:
        numbered = f"{weights}.numbered"  # beside it: the tensors may be read from the first file
        metadata = {"format": "pt", METADATA_SAVE: number, METADATA_CONFIG: json.dumps(settings)}
        save_file(tensors, numbered, metadata=metadata)
        os.replace(numbered, weights)
    with open(path, "w") as file:
        json.dump(settings, file, indent=2, sort_keys=True)


def _staged_weights(source: str) -> dict[str, Tensor] | None:
    if os.path.isfile(path := os.path.join(source, SAFETENSORS_WEIGHTS_NAME)):
        return load_file(path)
    if os.path.isfile(path := os.path.join(source, WEIGHTS_NAME)):
        pickled = torch.load(path, "cpu", weights_only=True)
        return {key: tensor.clone().contiguous() for key, tensor in pickled.items()}
    return None


def _number_of(folder: str) -> str | None:
    try:
        saved = read_saved_weights(folder)
    except ValueError:  # damaged: whoever loads it is told
        return None
    return None if saved is None else saved.save


def _exchange(fresh: str, folder: str) -> None:
    """Move everything into place; writers take turns, so that no file of two saves stays."""
    try:
        turn = lock(folder, patience=PATIENCE_SECONDS)
    except OSError:  # no locks, or a writer that stands still: readers have the numbers
        turn = None
    try:
        for source, _, names in os.walk(fresh):
            target = os.path.join(folder, os.path.relpath(source, fresh))
            os.makedirs(target, exist_ok=True)
            if CONFIG_NAME in names:
                _exchange_adapter(source, target, names)
            else:
                for name in names:
                    os.replace(os.path.join(source, name), os.path.join(target, name))
    finally:
        if turn is not None:
            os.close(turn)


def _exchange_adapter(source: str, target: str, names: list[str]) -> None:
    if _is_of_another_method(target):
        os.remove(os.path.join(target, CONFIG_NAME))
    # The weights with metadata decide. Beside pickled weights they are there until the rest has
    # moved, and PEFT prefers them as long as they are.
    last = [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME]
    ordered = [name for name in names if name not in last]
    for name in ordered + [name for name in last if name in names]:
        os.replace(os.path.join(source, name), os.path.join(target, name))
    stale = SAFETENSORS_WEIGHTS_NAME if WEIGHTS_NAME in names else WEIGHTS_NAME
    if SAFETENSORS_WEIGHTS_NAME in names and os.path.isfile(os.path.join(target, stale)):
        os.remove(os.path.join(target, stale))


def _is_of_another_method(target: str) -> bool:
    try:
        with open(os.path.join(target, CONFIG_NAME)) as file:
            return json.load(file)["peft_type"] != METHOD
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, RecursionError):
        return True
