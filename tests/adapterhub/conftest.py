"""Every test starts and ends with nothing patched and nothing warned about."""

import sys

import pytest

from adapterkern import _env

if _env.TRITON_INTERPRET:  # as test_adapterhub_kernels.py starts the oracle
    from adapterkern.testing import enable_triton_interpreter

    enable_triton_interpreter()


@pytest.fixture(autouse=True)
def clean_slate():
    def clean():
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
