"""All tests share a fixed seed, a clean dispatcher, and the device where there is one."""

import os
import signal
import sys

import cuda_facts
import pytest
import thorough
import torch

from adapterkern import dispatch
from adapterkern.backends import _loaded
from adapterkern.backends.base import FIRST_FEATURES, NORM_FEATURES
from adapterkern.backends.cuda import launch_config
from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.backends.triton import tuned
from adapterkern.testing import lost_device

DEVICE_LOST = 86  # exit code of a worker of pytest-xdist whose device is gone


def _interrupt(number, frame):
    raise KeyboardInterrupt


def pytest_configure(config):
    config.pluginmanager.register(thorough.Report(config))
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: fixtures end what they started
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; tests send it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, with what they start
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """After a gpu test the device must answer: one that is lost fails every test that follows in
    the process. A worker of pytest-xdist ends at once, for xdist to report the test as crashed and
    go on with a new worker; without xdist the run ends here."""
    result = yield
    if item.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return result
    lost = lost_device("cuda")
    if lost is None:
        return result
    message = f"{lost} (after {item.nodeid})"
    if "PYTEST_XDIST_WORKER" in os.environ:
        print(message, file=sys.__stderr__, flush=True)
        os._exit(DEVICE_LOST)
    pytest.exit(message, returncode=1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_searches_of_this_user():
    """What `adapterkern tune` has left in the user's cache folder decides nothing in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "FOLDERS", tuned.FOLDERS[1:])
        yield


@pytest.fixture(autouse=True, scope="session")
def _facts_of_the_sources():
    """Plans of the CUDA kernels are tested without the extension, by what csrc/ says of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_config, "facts", cuda_facts.of_the_sources)
        yield


@pytest.fixture(autouse=True)
def clean_dispatch(monkeypatch):
    """Begin with nothing decided and nothing logged."""
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(dispatch, "_logged", {})


@pytest.fixture
def recompiled():
    """torch.compile starts from nothing, before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class SpyBackend(ReferenceBackend):
    """Poses to autograd and dispatch as a kernel backend: it hides its maths, and remembers."""

    name = "triton"
    devices = frozenset({"cpu", "meta"})
    features = FIRST_FEATURES | NORM_FEATURES

    def __init__(self):
        self.forwards = []  # each one's `save`
        self.backwards = []  # each one's Needs

    def forward(self, call, save):
        self.forwards.append(save)
        with torch.no_grad():
            return super().forward(call, save)

    def backward(self, call, saved, upstream, needs):
        self.backwards.append(needs)
        with torch.no_grad():
            return super().backward(call, saved, upstream, needs)


@pytest.fixture
def spy(monkeypatch, clean_dispatch):
    """A kernel backend for the CPU in the place of triton; it comes before the reference."""
    backend = SpyBackend()
    monkeypatch.setitem(_loaded, "triton", backend)
    return backend
