"""What the tests of `adapterkern demo` share: texts, a tiny model, a trained one."""

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the demo needs transformers")
for name in ("peft", "matplotlib", "tqdm"):
    pytest.importorskip(name, reason=f"the demo needs {name}")

from adapterkern.cli.demo import corpus, experiment, model, training  # noqa: E402

CPU = torch.device("cpu")


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
