"""One build of the emulator for all tests here, and memory that is NaN until it is written."""

import fcntl
import os

import cuda_emulator
import pytest
import torch

from adapterkern.testing import nan_filled_memory


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
