"""The demo's contest: methods in turn, seeds, and what the report makes of the outcomes."""

import numpy as np
import pytest
import torch
from contests import options

from adapterkern.cli.demo import contest, corpus, experiment, training
from adapterkern.cli.demo.recipes import METHODS, RECIPES

TOPIC, KIND = corpus.TASKS
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two_seeds(tiny_model, texts):
    """A contest from two seeds, and the order in which its steps were taken."""
    from contests import run_contest

    order = []
    step = training.Training.step

    def noted(self):
        config = getattr(self.model.encoder, "active_peft_config", None)
        order.append(
            {"BOTTLENECK": "adapters", "LORA": "lora"}.get(config and config.peft_type, "full")
        )
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "step", noted)
        run = run_contest(tiny_model, texts, seed=3, seeds=2)
    return run, order


def test_rotation_puts_each_item_first_in_turn():
    assert [contest.rotated([1, 2, 3], by) for by in range(4)] == [
        [1, 2, 3], [2, 3, 1], [3, 1, 2], [1, 2, 3]
    ]  # fmt: skip


def test_methods_take_their_steps_in_turn(two_seeds):
    _, order = two_seeds
    assert len(order) == 2 * 2 * 3 * 3  # seeds, tasks, steps, methods
    a, b, c = METHODS
    assert order[:9] == [a, b, c, b, c, a, c, a, b]
    assert order == order[:9] * 4


def test_a_training_is_the_same_whoever_takes_turns_with_it(two_seeds, tiny_model):
    run, _ = two_seeds
    from adapterkern.cli.demo import model

    torch.manual_seed(3)
    alone = model.start_task(None, "adapters", TOPIC, tiny_model, CPU, 0)
    torch.manual_seed(3)
    alone.heads["topic"].reset_parameters()
    one = training.Training(
        alone, TOPIC, run.data.train[TOPIC], RECIPES["adapters"], steps=3, batch_size=8, seed=3
    )
    losses = [one.step() for _ in range(3)]
    assert losses == run.outcomes["adapters", "topic", 3].losses


def test_every_method_starts_from_the_same_head_and_each_seed_from_another(two_seeds):
    run, _ = two_seeds
    for seed in run.seeds:
        before = [run.outcomes[m, "topic", seed].before for m in METHODS]
        assert torch.equal(before[0], before[1])
        assert torch.equal(before[0], before[2])
    first, second = (run.outcomes["full", "topic", seed] for seed in run.seeds)
    assert not torch.equal(first.before, second.before)
    assert first.losses != second.losses


def test_a_method_result_is_the_mean_over_its_seeds(two_seeds):
    run, _ = two_seeds
    result = experiment.method_result("lora", run)
    for task, found in zip(corpus.TASKS, result.tasks, strict=True):
        held_out = run.data.held_out[task]
        each = [training.accuracy(run.outcomes["lora", task.name, s].logits, held_out)
                for s in (3, 4)]  # fmt: skip
        assert found.by_seed == each
        assert found.after == pytest.approx(np.mean(each))
        half = 12.706 * np.std(each, ddof=1) / np.sqrt(2)
        assert found.interval == pytest.approx([found.after - half, found.after + half])
        assert found.head == 33 * len(task.labels)
        assert found.losses == run.outcomes["lora", task.name, 3].losses
    seconds = [s for (m, *_), one in run.outcomes.items() if m == "lora" for s in one.seconds]
    assert result.step_ms == pytest.approx(1e3 * np.median(seconds))
    assert result.peak_bytes is None  # a CPU


def outcome(texts: int, right: int) -> contest.Outcome:
    """Two classes; every text is of class 0, and the first `right` are told so."""
    logits = torch.zeros(texts, 2)
    logits[:, 1] = 1.0
    logits[:right, 0] = 2.0
    return contest.Outcome(10, logits, logits, [1.0], [0.1], None)


def test_differences_are_paired_text_by_text(tiny_model):
    encoded = training.Encoded([[1]] * 100, [0] * 100, 0, CPU)
    data = {TOPIC: encoded, KIND: encoded}
    run = contest.Contest(options(tiny_model), contest.Data(data, data, torch.zeros(100, 4)))
    for task in corpus.TASKS:
        for method, right in (("adapters", 80), ("lora", 80), ("full", 90)):
            run.outcomes[method, task.name, 0] = outcome(100, right)
    found = experiment.differences(run)
    assert [(one.task, one.method) for one in found] == [
        ("topic", "lora"), ("topic", "full"), ("kind", "lora"), ("kind", "full")
    ]  # fmt: skip
    assert (found[0].mean, found[0].interval) == (0.0, [0.0, 0.0])  # the same texts
    assert found[1].mean == pytest.approx(-0.1)
    low, high = found[1].interval
    assert low == pytest.approx(-0.16, abs=0.011)  # 10 of 100: 10 -+ 1.96 * 3
    assert high == pytest.approx(-0.04, abs=0.011)
