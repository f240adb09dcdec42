"""Runs the CUDA kernels on the CPU: the backend as it is, with the emulator as its extension."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

import cuda_emulator
import pytest
import torch

from adapterkern import dispatch
from adapterkern.backends import _loaded
from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.launch_config import Device
from adapterkern.testing import nan_filled_memory

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


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> cuda_emulator.Emulator:
    if cuda_emulator.missing() is not None:
        pytest.skip(cuda_emulator.missing())
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a minute's work: the first worker does it for all
        root = root.parent
    with open(root / "emulator.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = root / "emulator" / "library.so"
        if not library.exists():
            cuda_emulator.build(library.parent)
    return cuda_emulator.Emulator(library)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    with nan_filled_memory():
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """The eager results beside the kernels' do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
