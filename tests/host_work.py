"""Counts what one call makes the host do: the same in every run, as no time is."""

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapterkern
from adapterkern.backends import get
from adapterkern.results import Outputs, Saved

PACKAGE = str(Path(adapterkern.__file__).parent)
MODULE_CALL = nn.Module.__call__.__code__


class Work(NamedTuple):
    """Counts of one call: Python frames, modules called, and calls by the package's own code."""

    frames: int
    modules: int
    own_calls: Counter


def work_of(call: Callable[[], object]) -> Work:
    for _ in range(2):
        call()  # what the first calls decide is not decided again
    frames, modules, own_calls = 0, 0, Counter()

    def count(frame, event, function):
        nonlocal frames, modules
        if event == "call":
            frames += 1
            modules += frame.f_code is MODULE_CALL
            caller, name = frame.f_back, frame.f_code.co_name
        elif event == "c_call":
            caller, name = frame, function.__name__
        else:
            return
        if caller.f_code.co_filename.startswith(PACKAGE):
            own_calls[name] += 1

    gc.disable()  # a collection amid the call would run the finalizers of other tests' objects
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return Work(frames, modules, own_calls)


@contextlib.contextmanager
def free_kernel(y: Tensor, z: Tensor) -> Iterator[None]:
    """The backend has its results ready: what is left of a call is what a kernel waits for."""
    statistics = y.new_empty(y.shape[:-1].numel())
    results = Outputs(y), Saved(z)
    normed = Outputs(y, torch.empty_like(y)), Saved(z, statistics, statistics.clone())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            get("reference"),
            "forward",
            lambda call, save: results if call.norm == "none" else normed,
        )
        yield


class Operations(TorchDispatchMode):
    """The names of the operations that run within, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation.overloadpacket))
        return operation(*args, **(kwargs or {}))
