"""adapterkern._env: the documented variables, and their page."""

import re
from pathlib import Path

from adapterkern import _env

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
