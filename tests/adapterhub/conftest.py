"""Every test starts and ends with nothing patched, compiled or warned about."""

import sys

import pytest
import torch

from adapterkern import _env, _torch

if _env.TRITON_INTERPRET:  # as test_adapterhub_kernels.py starts the oracle
    from adapterkern.testing import enable_triton_interpreter

    enable_triton_interpreter()


@pytest.fixture(autouse=True)
def clean_slate():
    def clean():
        if _torch.has_compiled():  # of which `patch` warns
            torch.compiler.reset()
        fast_path = sys.modules.get("adapterkern.integrations.adapterhub.fast_path")
        if fast_path is not None:
            from adapterkern.integrations import adapterhub
            from adapterkern.integrations.adapterhub.patching import is_installed

            if is_installed():
                adapterhub.unpatch()
            fast_path.warned.clear()

    clean()
    yield
    clean()


@pytest.fixture
def counted(monkeypatch):
    """Every adapter call that ran on this package's operation."""
    from adapterhub_oracle import change_calls

    calls = []

    def count(call):
        calls.append(call)
        return call

    change_calls(monkeypatch, count)
    return calls
