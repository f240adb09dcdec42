"""The demo's adapters in one mixed batch: the check of it, its times, its lines."""

import pytest
import torch
from contests import run_contest

from adapterkern.cli.demo import checks, corpus, mixed, training
from adapterkern.cli.demo.recipes import RECIPES, Recipe
from adapterkern.grouped import reference

TASK = corpus.TASKS[0]
TRAINED = [task.name for task in corpus.TASKS]
RANDOM = [f"random_{number}" for number in range(1, 7)]


def test_mixed_check_holds_for_trained_and_random_adapters_and_for_none(trained):
    classifier, data, _ = trained
    with mixed.open_mixed_batch(classifier, data[TASK]) as batch:
        verdict = mixed.check_mixed(batch)
        assert list(batch.rows) == [*TRAINED, *RANDOM, None]
        widths = [batch.banks[layer][name].bottleneck_size for layer in batch.banks
                  for name in RANDOM]  # fmt: skip
        assert widths == [2, 1, 1, 2, 1, 1] * 4  # at both sublayers of two layers
    assert verdict.passed
    errors = verdict.numbers["errors"]
    assert list(errors) == [*TRAINED, *RANDOM, "None"]
    assert max(errors.values()) < 1e-6  # 0 where products have the same bits for any number of rows
    assert verdict.numbers["backend"] == "reference"
    assert verdict.detail.startswith(
        "8 adapters, trained and random, and none, 2 texts each; largest rel"
    )


def test_checks_hold_for_adapters_beside_the_ffn(tiny_model, texts, monkeypatch):
    settings = {"placement": "parallel", "reduction_factor": 8, "scaling": 4.0}
    recipe = Recipe("parallel", 2e-3, settings=settings)
    monkeypatch.setitem(RECIPES, "adapters", recipe)
    run = run_contest(tiny_model, texts)
    with mixed.open_mixed_batch(run.adapters, run.data.held_out[TASK]) as batch:
        verdict = mixed.check_mixed(batch)
        assert len(batch.banks) == 2  # one a layer
    assert verdict.passed
    assert checks.check_gradients(run.adapters, TASK, run.data.held_out[TASK], 8).passed


def test_a_mixed_batch_leaves_the_model_as_it_was(trained):
    classifier, data, recorded = trained
    encoder = classifier.encoder
    encoder.set_adapter("topic")
    names = [name for name, _ in encoder.named_parameters()]
    with mixed.open_mixed_batch(classifier, data[TASK]) as batch, batch.banks_in_place():
        batch.features()
    assert [name for name, _ in encoder.named_parameters()] == names
    assert list(encoder.peft_config) == TRAINED
    assert encoder.active_adapter == "topic"
    trains = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trains == {name for name in names if ".topic." in name}
    assert torch.equal(training.logits_of(classifier, TASK, data[TASK]), recorded[TASK])


@pytest.mark.parametrize("fault", ["another-adapter", "wrong-arithmetic", "not-switched"])
def test_mixed_check_notices(fault, trained, monkeypatch):
    classifier, data, _ = trained
    if fault == "another-adapter":
        ids = mixed.AdapterBank.ids
        monkeypatch.setattr(mixed.AdapterBank, "ids", lambda bank, names: ids(bank, names).roll(1))
    if fault == "wrong-arithmetic":
        of_slot = reference.of_slot

        def wrong(*given):
            call = of_slot(*given)
            return call._replace(scaling=1.01 * call.scaling)

        monkeypatch.setattr(reference, "of_slot", wrong)
    with mixed.open_mixed_batch(classifier, data[TASK]) as batch:
        if fault == "not-switched":
            monkeypatch.setattr(classifier.encoder, "set_adapter", lambda name: None)
        verdict = mixed.check_mixed(batch)
        monkeypatch.undo()
    assert not verdict.passed
    bad = {name for name, error in verdict.numbers["errors"].items() if error > 1e-5}
    assert "topic" in bad or "kind" in bad
    assert ("None" in bad) == (fault == "another-adapter")  # nothing else touches those texts


def test_mixed_times_make_no_speed_claim_on_a_cpu(trained):
    classifier, data, _ = trained
    with mixed.open_mixed_batch(classifier, data[TASK]) as batch:
        (times,) = mixed.time_mixed(batch, repeats=1)
    assert not times.is_speed_claim
    assert times.backend == "reference"
    assert (times.runs, times.tokens[0]) == (9, 18)
    assert min(times.mixed_ms, times.switched_ms) > 0
