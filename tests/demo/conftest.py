"""What the tests of `adapterkern demo` share: texts, a tiny model, a trained one."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the demo needs transformers")
for name in ("peft", "matplotlib", "tqdm"):
    pytest.importorskip(name, reason=f"the demo needs {name}")

from contests import run_contest  # noqa: E402

from adapterkern.cli.demo import corpus  # noqa: E402
from adapterkern.cli.demo.recipes import RECIPES, Recipe  # noqa: E402


@pytest.fixture(scope="session")
def texts() -> corpus.Corpus:
    return corpus.load_corpus()


@pytest.fixture(scope="session")
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
def trained(tiny_model, texts, monkeypatch):
    """Both tasks trained for three steps with adapters behind both sublayers, whatever the search
    chose: classifier, held-out data and logits."""
    recipe = Recipe("houlsby", 4e-3, settings={"placement": "houlsby", "reduction_factor": 16})
    monkeypatch.setitem(RECIPES, "adapters", recipe)
    run = run_contest(tiny_model, texts)
    recorded = {task: run.outcomes["adapters", task.name, 0].logits for task in corpus.TASKS}
    return run.adapters, run.data.held_out, recorded
