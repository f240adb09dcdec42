"""Runs the Triton kernels on the CPU, in the processes with TRITON_INTERPRET=1 that
tests/test_interpreter_suite.py starts; elsewhere nothing here is collected."""

import pytest
import torch
from forms import FORMS

from adapterkern import _env
from adapterkern.testing import enable_triton_interpreter, nan_filled_memory

if _env.TRITON_INTERPRET:
    enable_triton_interpreter()
    from triton.runtime import interpreter

    from adapterkern.backends.triton import backend as triton_backend
    from adapterkern.backends.triton.launch_config import Device, RowBlock, Split
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def run_as(monkeypatch):
    """run_as(name): from here on every call takes that form, and each launch is checked to."""

    def choose(name: str) -> None:
        form = FORMS[name]
        device = Device(num_sms=form.num_sms, shared_memory=227 * 1024)
        monkeypatch.setattr(triton_backend, "cpu_device", device)
        token_plan = triton_backend.token_plan
        weight_gradient_plan = triton_backend.weight_gradient_plan

        def checked_token_plan(*arguments):
            plan = token_plan(*arguments)
            assert isinstance(plan, RowBlock if form.row_block else Split)
            assert form.row_block or (plan.num_splits > 1) == form.feature_slices
            return plan

        def checked_weight_gradient_plan(*arguments):
            plan = weight_gradient_plan(*arguments)
            assert (plan.num_splits > 1) == form.token_slices
            return plan

        monkeypatch.setattr(triton_backend, "token_plan", checked_token_plan)
        monkeypatch.setattr(triton_backend, "weight_gradient_plan", checked_weight_gradient_plan)

    return choose


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


@pytest.fixture(autouse=True)
def language_patched_once(monkeypatch):
    """A kernel patches the language for the interpreter, and each function that it calls does so
    again, which takes half of the time of small tiles. Triton's own functions need it once."""
    patched = set()

    def called(function, *args, **named):
        module = function.fn.__module__
        if module.startswith("triton.") and module not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(module)
        return function.rewrite()(*args, **named)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)
