"""The registry: backend name to import path, in order of priority. A new backend adds one line."""

import importlib

import torch

from adapterkern import _torch
from adapterkern.backends.base import Backend

# Triton before CUDA until both are measured on a GPU.
_PATHS = {
    "triton": "adapterkern.backends.triton.backend:TritonBackend",
    "cuda": "adapterkern.backends.cuda.backend:CudaBackend",
    "reference": "adapterkern.backends.reference.backend:ReferenceBackend",
}

NAMES = tuple(_PATHS)

_loaded: dict[str, Backend] = {}


def get(name: str) -> Backend:
    """The backend called `name`, imported at first use.

    Raises:
        ValueError: the name is not registered; the message lists the names that are.
    """
    if torch.compiler.is_compiling():
        _load(NAMES)
    elif name not in _loaded:
        _load((name,))
    return _loaded[name]


@_torch.constant_under_compile  # it cannot trace an import, and need not
def _load(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in _PATHS:
            known = ", ".join(NAMES)
            raise ValueError(
                f"unknown backend {name!r}.\n  hint: known backends are auto, {known}."
            )
        if name not in _loaded:
            module, attribute = _PATHS[name].split(":")
            # Threads may come here at once: the first one's is everybody's.
            _loaded.setdefault(name, getattr(importlib.import_module(module), attribute)())
