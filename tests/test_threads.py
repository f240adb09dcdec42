"""Threads that call at once: each has its own blocks of use_backend, all share what is known."""

import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import adapterkern as ak
from adapterkern import dispatch

backends = sys.modules["adapterkern.backends"]  # whose name the package gives to a function


def backend_now():
    return dispatch.wanted_backend("auto")


def in_a_thread(function, *given):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *given).result(timeout=60)


def test_overlapping_blocks_in_threads_do_not_undo_each_other():
    """The first to open is the first to close, while the second is still open."""
    opened, closed = threading.Event(), threading.Event()
    seen = {}

    def second():
        with ak.use_backend("triton"):
            opened.set()
            assert closed.wait(60)
            seen["second, inside"] = backend_now()
        seen["second, after"] = backend_now()

    thread = threading.Thread(target=second)
    with ak.use_backend("reference"):
        thread.start()
        assert opened.wait(60)
        seen["first, inside"] = backend_now()
    seen["first, after"] = backend_now()
    closed.set()
    thread.join(60)
    assert seen == {
        "first, inside": "reference",
        "first, after": "auto",
        "second, inside": "triton",
        "second, after": "auto",
    }
    assert not dispatch._open
    assert dispatch._latest is None


def test_a_block_is_of_its_thread_alone():
    with ak.use_backend("reference"):
        assert backend_now() == "reference"
        assert in_a_thread(backend_now) == "auto"
    assert in_a_thread(backend_now) == "auto"


def test_a_thread_that_python_did_not_start_follows_the_latest_block(monkeypatch):
    """As those of autograd do, which compute anew what checkpointing left out."""
    started = []

    def foreign():
        with monkeypatch.context() as patch:
            patch.setattr(threading, "enumerate", list)
            started.append(backend_now())  # looks once, at first
        proceed.set()
        assert go_on.wait(60)
        started.append(backend_now())

    proceed, go_on = threading.Event(), threading.Event()
    with ak.use_backend("reference"):
        with ak.use_backend("triton"):
            thread = threading.Thread(target=foreign)
            thread.start()
            assert proceed.wait(60)
        go_on.set()
        thread.join(60)
    assert started == ["triton", "reference"]


def test_compiled_code_follows_the_block_of_the_thread_that_runs_it(spy, recompiled):
    given = torch.randn(3, 8), torch.randn(4, 8), torch.randn(8, 4)
    compiled = torch.compile(ak.bottleneck_adapter, backend="aot_eager", fullgraph=True)

    def under(name):
        before = len(spy.forwards)
        with ak.use_backend(name):
            compiled(*given)
        return len(spy.forwards) - before

    with ak.use_backend("reference"):
        compiled(*given)
        assert not spy.forwards
        assert in_a_thread(under, "triton") == 1
        compiled(*given)
    assert len(spy.forwards) == 1
    assert in_a_thread(under, "reference") == 0


def test_first_calls_at_once_load_one_backend(monkeypatch):
    monkeypatch.setattr(backends, "_loaded", {})
    ready = threading.Barrier(2)
    load = backends.importlib.import_module

    def together(name):
        ready.wait(60)  # both threads have seen that nothing is loaded
        return load(name)

    monkeypatch.setattr(backends.importlib, "import_module", together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(backends.get, ["reference", "reference"], timeout=60)
    assert first is second
    assert backends._loaded == {"reference": first}


def test_first_fallbacks_at_once_are_logged_once(monkeypatch, caplog):
    class Slow(dict):
        """All threads come to ask before one of them has an answer."""

        def setdefault(self, key, mark):
            ready.wait(60)
            return super().setdefault(key, mark)

        def __contains__(self, key):
            found = super().__contains__(key)
            ready.wait(60)
            return found

    ready = threading.Barrier(3)
    monkeypatch.setattr(dispatch, "_logged", Slow())
    caplog.set_level(logging.WARNING, "adapterkern")
    device = torch.device("cpu")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: dispatch._report(device, "a call", "a reason"), range(3)))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("count", [4])
def test_threads_that_call_at_once_get_their_own_results(count):
    def call(seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = (3, 8), (4, 8), (8, 4)
        given = [torch.randn(shape, generator=generator) for shape in shapes]
        with ak.use_backend("reference" if seed % 2 else "auto"):
            results = [ak.bottleneck_adapter(*given, scaling=0.1 * n) for n in range(1, 40)]
        return results, given

    with ThreadPoolExecutor(count) as pool:
        for results, (x, down, up) in pool.map(call, range(count)):
            u = torch.nn.functional.gelu(x @ down.T) @ up.T
            for n, y in enumerate(results, 1):
                torch.testing.assert_close(y, x + 0.1 * n * u)
