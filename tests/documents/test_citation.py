"""CITATION.cff says what the package says of itself."""

import pytest
from command_lines import HOME, PROJECT
from snippets import ROOT

import adapterkern

yaml = pytest.importorskip("yaml", reason="CITATION.cff is YAML")


def test_citation_names_this_version_and_home():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == adapterkern.__version__
    assert cited["repository-code"] == HOME
    assert cited["license"] == PROJECT["project"]["license"]
    assert [one["url"].rpartition("/")[2] for one in cited["references"]] == [
        "1902.00751", "2005.00247", "2110.04366",
    ]  # fmt: skip
