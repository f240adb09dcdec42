"""adapterkern._env: the documented variables, and their page."""

import logging
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adapterkern as ak
from adapterkern import _env, dispatch
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


MEANT = "ADAPTERKERN_BACKND is no variable of adapterkern; did you mean ADAPTERKERN_BACKEND?"


@pytest.fixture
def misspelled(monkeypatch):
    """As if ADAPTERKERN_BACKND had been set before the import, and no call had been made."""
    monkeypatch.setattr(_env, "UNKNOWN", ("ADAPTERKERN_BACKND",))
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(dispatch, "_logged", {})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ADAPTERKERN_BACKND", "; did you mean ADAPTERKERN_BACKEND?"),
        ("adapterkern_strict", "; did you mean ADAPTERKERN_STRICT?"),
        ("ADAPTERKERN_CUDA_ARCH", "; did you mean ADAPTERKERN_CUDA_ARCHS?"),
        ("ADAPTERKERN_COLOUR", " and has no effect; it has ADAPTERKERN_BACKEND, "),
    ],
)
def test_an_unknown_variable_is_told_with_the_nearest_known_name(monkeypatch, name, says):
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ADAPTERKERN_BUILD_CUDA", "0")  # known, although of install time
    read = runpy.run_path(_env.__file__, run_name="read_anew")
    assert read["UNKNOWN"] == (name,)
    (sentence,) = read["unknown_variables"]()
    assert sentence.startswith(f"{name} is no variable of adapterkern{says}")


def test_a_misspelled_variable_is_logged_once_at_the_first_call(misspelled, caplog):
    caplog.set_level(logging.WARNING, logger="adapterkern")
    x = torch.zeros(1, 8)
    adapter = ak.BottleneckAdapter(8, 2)
    assert caplog.messages == []
    for dtype in (torch.float32, torch.float64, torch.float32):  # two decisions
        adapter.to(dtype)(x.to(dtype))
    assert caplog.messages == [MEANT]


def test_a_misspelled_variable_breaks_no_graph(misspelled, caplog):
    caplog.set_level(logging.WARNING, logger="adapterkern")
    adapter, x = ak.BottleneckAdapter(8, 2), torch.randn(3, 8)
    compiled = torch.compile(adapter, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), adapter(x))
    assert caplog.messages == [MEANT]


@pytest.mark.sweep("told")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-c", "import adapterkern"], 0),
        (["-m", "adapterkern", "info"], 1),
        (["-m", "adapterkern", "check", "--quick", "--dtype=fp64"], 1),
        (
            ["-c", "import adapterkern, torch; adapterkern.BottleneckAdapter(8)(torch.zeros(8))"],
            1,
        ),
    ],
    ids=["import", "info", "check", "call"],
)
def test_a_process_tells_a_misspelled_variable_once_on_stderr(words, told):
    """An import is silent. `check` starts processes, which have nothing to add."""
    variables = {**os.environ, "ADAPTERKERN_BACKND": "triton"}
    done = subprocess.run(
        [sys.executable, *words], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(MEANT) == told
