"""The demo's adapters with the norm in their pass: the check of it, its times, its lines."""

import torch
from contests import run_contest

from adapterkern import norm
from adapterkern.cli.demo import corpus, norms, training
from adapterkern.cli.demo.recipes import RECIPES, Recipe
from adapterkern.integrations.transformers import explain

TASK = corpus.TASKS[0]


def test_norm_check_holds_and_leaves_the_model_as_it_was(trained):
    classifier, data, recorded = trained
    verdict = norms.check_norms(classifier, TASK, data[TASK], 8)
    assert verdict.passed
    assert verdict.numbers["adapters"] == 4  # both sublayers of two layers
    errors = verdict.numbers["errors"]
    assert len(errors) == 1 + 4 * 4  # the loss, weights and biases of 4 adapters
    assert any(error > 0 for error in errors.values())  # two different paths ran
    assert verdict.detail.startswith("4 of 4 adapters; loss and 16 gradients, largest relative")
    assert not any(row.fused for row in explain(classifier.encoder).rows)
    assert torch.equal(training.logits_of(classifier, TASK, data[TASK]), recorded[TASK])


def test_norm_check_notices_wrong_arithmetic(trained, monkeypatch):
    classifier, data, _ = trained
    backward = norm.backward

    def wrong(*arguments):
        ds, found = backward(*arguments)
        return 1.001 * ds, found

    monkeypatch.setattr(norm, "backward", wrong)
    verdict = norms.check_norms(classifier, TASK, data[TASK], 8)
    assert not verdict.passed
    assert verdict.numbers["errors"]["loss"] < 1e-6


def test_a_model_without_a_norm_behind_its_adapters_has_no_such_check(trained, monkeypatch):
    classifier, data, _ = trained
    monkeypatch.setattr(norms, "fuse_norms", lambda encoder: explain(encoder))
    assert norms.check_norms(classifier, TASK, data[TASK], 8) is None
    assert norms.time_forwards(classifier, TASK, data[TASK], 4, repeats=1) == []


def test_adapters_beside_a_block_have_no_such_check(tiny_model, texts, monkeypatch):
    recipe = Recipe("parallel", 2e-3, settings={"placement": "parallel", "reduction_factor": 8})
    monkeypatch.setitem(RECIPES, "adapters", recipe)
    run = run_contest(tiny_model, texts)
    held_out = run.data.held_out[TASK]
    assert norms.check_norms(run.adapters, TASK, held_out, 8) is None
    assert norms.time_forwards(run.adapters, TASK, held_out, 4, repeats=1) == []


def test_forward_times_make_no_speed_claim_on_a_cpu(trained):
    classifier, data, _ = trained
    (forward,) = norms.time_forwards(classifier, TASK, data[TASK], batch_size=4, repeats=1)
    assert not forward.is_speed_claim
    assert forward.backend == "reference"
    assert min(forward.norm_ms, forward.fused_ms, forward.eager_ms) > 0
    assert not any(row.fused for row in explain(classifier.encoder).rows)
