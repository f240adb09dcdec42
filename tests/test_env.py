"""adapterkern._env: the documented variables, and their page."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import adapterkern as ak
from adapterkern import _env
from adapterkern.backends import NAMES

ROOT = Path(__file__).parents[1]


def test_environment_page_is_in_sync():
    """Regenerate with `python adapterkern/_env.py`."""
    assert (ROOT / "docs/environment.md").read_text() == _env.markdown()


def test_every_variable_that_is_read_is_documented():
    sources = [*(ROOT / "adapterkern").rglob("*.py"), ROOT / "setup.py"]
    text = "\n".join(path.read_text() for path in sources)
    read = set(re.findall(r"\"(ADAPTERKERN_\w+)\"", text))
    assert read == {v.name for v in _env.VARIABLES if v.name.startswith("ADAPTERKERN_")}


def test_in_force_lists_what_is_set(monkeypatch):
    monkeypatch.setenv("ADAPTERKERN_STRICT", "1")
    assert _env.in_force()["ADAPTERKERN_STRICT"] == "1"
    monkeypatch.delenv("ADAPTERKERN_STRICT")
    assert "ADAPTERKERN_STRICT" not in _env.in_force()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("/big/disk", "/big/disk"), ("", "/home/me/.cache"), ("here", "/home/me/.cache")],
)
def test_the_cache_folder_is_the_users_own(monkeypatch, value, wanted):
    """A relative path is ignored, as the XDG specification asks."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    read = runpy.run_path(_env.__file__, run_name="read_anew")
    assert read["CACHE"] == Path(wanted, "adapterkern")


@pytest.mark.parametrize(
    ("name", "attribute", "value", "known"),
    [
        ("ADAPTERKERN_BACKEND", "BACKEND", "foo", ("auto", *NAMES)),
        ("ADAPTERKERN_STRICT", "STRICT", "yes", ("0", "1")),
    ],
)
def test_a_value_outside_the_list_is_refused_at_the_first_use(
    monkeypatch, name, attribute, value, known
):
    adapter, x = ak.BottleneckAdapter(8, 2), torch.zeros(1, 8)
    monkeypatch.setattr(_env, attribute, value)
    for use in (adapter, lambda x: ak.explain(adapter, x)):
        with pytest.raises(ValueError, match=name) as caught:
            use(x)
        assert f"must be one of {', '.join(known)}, got '{value}'" in str(caught.value)
        assert f"hint: unset {name}" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_backend_can_be_named_by_the_environment(monkeypatch, name):
    adapter, x = ak.BottleneckAdapter(8, 2), torch.zeros(1, 8)
    monkeypatch.setattr(_env, "BACKEND", name)
    chosen = f"{name} (named)" if name == "reference" else f"none: {name} was named and raises"
    assert ak.explain(adapter, x).backend == chosen
