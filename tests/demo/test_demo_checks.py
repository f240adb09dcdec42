"""The demo's checks, on a trained model and on one that was tampered with."""

import os

import pytest
import torch
from torch import nn

from adapterkern.cli.demo import checks, corpus, model


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


def test_an_interrupted_save_leaves_the_earlier_adapter(trained, tiny_model, tmp_path, monkeypatch):
    classifier, task = trained[0], corpus.TASKS[0]
    place, replace = model.save_task(classifier, task, tiny_model, tmp_path), os.replace
    before = {path.name: path.read_bytes() for path in place.iterdir()}

    def interrupted(source, target):
        if target == place:
            monkeypatch.setattr(os, "replace", replace)  # one Ctrl-C
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with torch.no_grad():
        classifier.heads[task.name].bias[0] += 1
    with pytest.raises(KeyboardInterrupt):
        model.save_task(classifier, task, tiny_model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [task.name]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


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
