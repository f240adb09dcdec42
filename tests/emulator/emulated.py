"""Runs the CUDA kernels on the CPU: the backend as it is, with the emulator as its extension."""

import contextlib
from collections.abc import Iterator

import cuda_emulator
import pytest

from adapterkern import dispatch
from adapterkern.backends import _loaded
from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.facts import Device

ONE_SM = Device(num_sms=1)


@contextlib.contextmanager
def emulated(kernels: cuda_emulator.Emulator, device: Device = ONE_SM) -> Iterator[None]:
    """Within the block the cuda backend runs CPU tensors on `kernels`.

    With one SM every problem of more than no tokens is large enough for the row-block form.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_loaded, "cuda", CudaBackend(kernels, device))
        patch.setattr(dispatch, "_decisions", {})
        yield
