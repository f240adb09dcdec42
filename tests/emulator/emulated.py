"""Runs the CUDA kernels on the CPU: the backend as it is, with the emulator as its extension."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import cuda_emulator
import pytest

from adapterkern import dispatch
from adapterkern.backends import _loaded
from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.facts import Device

ONE_SM = Device(num_sms=1)


def with_fault(folder: Path, fault: tuple[str, str, str] | None) -> cuda_emulator.Emulator:
    """Build few kernels, with a fault: the file, a text of it, and what takes the text's place."""
    if cuda_emulator.missing() is not None:
        pytest.skip(cuda_emulator.missing())
    changes = cuda_emulator.narrowed("__nv_bfloat16")
    if fault is not None:
        file, *change = fault
        changes[file] = [tuple(change)]
    return cuda_emulator.Emulator(cuda_emulator.build(folder, changes=changes))


@contextlib.contextmanager
def emulated(kernels: cuda_emulator.Emulator, device: Device = ONE_SM) -> Iterator[None]:
    """Within the block the cuda backend runs CPU tensors on `kernels`.

    With one SM every problem of more than no tokens is large enough for the row-block form.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_loaded, "cuda", CudaBackend(kernels, device))
        patch.setattr(dispatch, "_decisions", {})
        yield
