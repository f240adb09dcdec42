"""A place where snippets run as if pasted: an empty folder, a namespace, a hub without network."""

import importlib.util
import sys
import types

import pytest
import stand_in_hub

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


@pytest.fixture
def namespace(monkeypatch):
    """The names of a fresh module, which pickle and inspect find as they find `__main__`."""
    module = types.ModuleType("pasted")
    monkeypatch.setitem(sys.modules, "pasted", module)
    return vars(module)


@pytest.fixture
def pasted_into(tmp_path, monkeypatch):
    """pasted_into(page): work in an empty folder, with the models that this page names."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def prepare(page):
        names = stand_in_hub.names_on(page)
        if names and HAS_TRANSFORMERS:
            stand_in_hub.fill(tmp_path / "hub", names)
        if HAS_TRANSFORMERS:
            stand_in_hub.use(tmp_path / "hub", monkeypatch)

    yield prepare
    _unpatch_adapterhub()


def _unpatch_adapterhub():
    if "adapterkern.integrations.adapterhub" in sys.modules:
        from adapterkern.integrations import adapterhub
        from adapterkern.integrations.adapterhub.patching import is_installed

        if is_installed():
            adapterhub.unpatch()
