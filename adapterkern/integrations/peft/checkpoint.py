"""Saved folders are written whole, and a model takes all of a folder that fits it, or nothing."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

Shapes = Mapping[str, tuple[int, ...]]

CONTAINER = "bottleneck_adapter"  # the module of a layer that holds its adapters by name
SHOWN = 4  # problems spelled out in an error; the rest is counted
MODEL_CARD = "README.md"


@contextmanager
def staged(folder: str) -> Iterator[str]:
    """Yield a folder to save into; its files move into `folder` when the block ends without error.

    Until then a saved adapter in `folder` is unchanged. While files are exchanged it has no
    configuration, so weights never meet another adapter's settings: a process killed in those few
    renames leaves a folder that loading refuses.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as fresh:
        if os.path.isfile(os.path.join(folder, MODEL_CARD)):  # PEFT extends a card that exists
            shutil.copy(os.path.join(folder, MODEL_CARD), fresh)
        yield fresh
        for source, _, names in os.walk(fresh):
            _exchange(source, os.path.join(folder, os.path.relpath(source, fresh)), names)


def _exchange(source: str, target: str, names: list[str]) -> None:
    os.makedirs(target, exist_ok=True)
    replaced = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME] if CONFIG_NAME in names else []
    for name in replaced:  # the other format of weights too: loading might prefer it
        if os.path.exists(os.path.join(target, name)):
            os.remove(os.path.join(target, name))
    for name in sorted(names, key=lambda name: name == CONFIG_NAME):
        os.replace(os.path.join(source, name), os.path.join(target, name))


def without_adapter_name(key: str, adapter_name: str) -> str:
    """The key of a saved weight, without the adapter's name so that it can be loaded under any."""
    return key.replace(f".{CONTAINER}.{adapter_name}.", f".{CONTAINER}.")


def read_saved_shapes(folder: str) -> Shapes | None:
    """Shapes of a folder's weights, from the file's header alone; None for a pickled file.

    Raises:
        ValueError: the file is missing, or does not end where its header says.
    """
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        if os.path.isfile(os.path.join(folder, WEIGHTS_NAME)):
            return None
        raise ValueError(
            f"{folder} has the configuration of a saved adapter but no {SAFETENSORS_WEIGHTS_NAME}."
            "\n  hint: copy the whole folder, or save the adapter again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short: {error}.\n"
            "  hint: copy the folder again, or save the adapter again"
        ) from error


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
    shown = "".join(f"\n  - {problem}" for problem in problems[:SHOWN])
    if len(problems) > SHOWN:
        shown += f"\n  - and {len(problems) - SHOWN} more"
    return ValueError(
        f"the saved adapter does not belong to this model; nothing of it was loaded:{shown}\n"
        "  hint: load the base model it was trained on; adapter_config.json may name it"
    )
