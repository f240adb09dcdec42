"""The lines that the report ends with: they run as pasted and say what the classifier says."""

import ast
import code
import json

import pytest
import torch
from canned import canned_report

from adapterkern.cli.demo import corpus, model, wording
from adapterkern.cli.demo.snippet import TEXT, snippet

CPU = torch.device("cpu")
TASK = corpus.TASKS[0]


@pytest.fixture
def classifier(tiny_model) -> model.TextClassifier:
    """One whose adapters and head are far from where they start."""
    torch.manual_seed(0)
    made = model.start_task(None, "adapters", TASK, tiny_model, CPU, 0)
    with torch.no_grad():
        for parameter in [p for p in made.parameters() if p.requires_grad]:
            parameter.normal_(std=0.5)
    return made.eval()


def printed_by(report) -> str:
    """What a user finds in the terminal below the last heading."""
    _, _, lines = wording.as_text(report).partition("\nUse your adapter now:\n\n")
    return lines


def test_the_printed_snippet_gives_the_label_of_the_classifier(
    classifier, tiny_model, tmp_path, capsys
):
    folder = model.save_task(classifier, TASK, tiny_model, tmp_path)
    saved = {**canned_report().saved, "folders": {TASK.name: str(folder)}}
    pasted = printed_by(canned_report(saved=saved))
    assert f'"{TEXT}"' in pasted
    names: dict = {}
    exec(pasted, names)
    tokens = model.load_tokenizer(tiny_model)(TEXT, return_tensors="pt")
    with torch.no_grad():
        logits = classifier(TASK.name, tokens["input_ids"], tokens["attention_mask"])
        classifier.encoder.disable_adapter_layers()
        without = classifier(TASK.name, tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(names["scores"], logits)
    assert capsys.readouterr().out == f"{TASK.labels[logits.argmax()]}\n"
    assert not torch.allclose(logits, without)  # the adapter counts


def test_the_snippet_can_be_pasted_at_a_prompt(tmp_path):
    """A prompt takes it line by line, and asks for an empty line behind an indented block."""
    for folder in ("adapterkern-demo/adapters/topic", str(tmp_path) + 30 * "/deep"):
        waiting = []
        for line in snippet(folder).splitlines():
            waiting.append(line)
            if code.compile_command("\n".join(waiting)) is not None:
                waiting = []
        assert waiting == []


@pytest.mark.parametrize(
    "folder",
    ["adapters/topic", 20 * "very-long-folder/", "C:\\" + 12 * "Users\\ä \"quoted\" ", "a" * 68],
    ids=["short", "long", "windows", "just-fits"],
)  # fmt: skip
def test_the_snippet_keeps_any_folder_within_80_columns(folder):
    lines = snippet(folder).splitlines()
    assert max(map(len, lines)) <= 80
    (assigned,) = [
        node.value
        for node in ast.parse("\n".join(lines)).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "folder"
    ]
    assert ast.literal_eval(assigned) == folder


def test_the_snippet_is_short():
    assert len(snippet("adapterkern-demo/adapters/topic").splitlines()) == 12


def test_what_the_snippet_reads_is_what_is_saved(classifier, tiny_model, tmp_path):
    folder = model.save_task(classifier, TASK, tiny_model, tmp_path)
    described = json.loads((folder / "task.json").read_text())
    assert described["base_model"] == tiny_model
    assert described["labels"] == list(TASK.labels)
