"""The demo's recipes, and the search that chose them."""

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from adapterkern.cli.demo import corpus, model, training
from adapterkern.cli.demo.recipes import BATCH_SIZE, METHODS, RECIPES, STEPS

search = pytest.importorskip("benchmarks.demo_recipe", reason="it is in the repository alone")
CPU = torch.device("cpu")
RECORD = Path(search.FOLDER) / "recipe.json"


def test_search_gives_every_method_as_many_trials():
    grids = {method: search.candidates(method) for method in METHODS}
    assert {len(grid) for grid in grids.values()} == {12}
    for grid in grids.values():
        assert len({(recipe.name, recipe.learning_rate) for recipe in grid}) == 12


def test_search_splits_the_training_texts_alone(texts):
    train, validation = search.split(texts.train)
    assert len(validation) == round(0.2 * len(texts.train))
    assert set(train) | set(validation) == set(texts.train)
    assert not set(train) & set(validation)
    keys = {corpus.text_key(doc.text) for doc in texts.held_out}
    assert not keys & {corpus.text_key(doc.text) for doc in train + validation}


class Canned(search.Search):
    """Results by rule in place of training: the best of a method is its third candidate."""

    def _run(self, trial):
        self.ran.append(trial)
        place = search.candidates(trial.method).index(trial.recipe)
        value = 0.5 - 0.01 * abs(place - 2)
        return {"accuracy": {"topic": value, "kind": value}, "loss": {"topic": 1 - value,
                "kind": 1 - value}, "trained": 7, "seconds": 0.0}  # fmt: skip


@pytest.fixture
def canned(tmp_path):
    found = Canned("", {}, {}, tmp_path / "trials.jsonl")
    found.ran = []
    return found


def test_search_takes_the_best_to_full_length_and_chooses_among_them(canned):
    best = canned.best("lora")
    grid = search.candidates("lora")
    assert best["chosen"]["recipe"] == asdict(grid[2])
    assert len(best["others"]) == search.FINALISTS - 1
    first = [trial for trial in canned.ran if trial.steps == search.FIRST_STEPS]
    second = [trial for trial in canned.ran if trial.steps == STEPS]
    assert [trial.recipe for trial in first] == grid
    assert [trial.recipe for trial in second if trial.seed == 0] == sorted(
        grid[: search.KEPT], key=lambda recipe: abs(grid.index(recipe) - 2)
    )
    others = [(trial.recipe, trial.seed) for trial in second if trial.seed]
    seeds = range(1, search.SEEDS)
    assert others == [(recipe, seed) for recipe in (grid[2], grid[1]) for seed in seeds]


def test_search_goes_on_where_it_was_stopped(canned):
    canned.best("full")
    lines = canned.path.read_text().splitlines(keepends=True)
    canned.path.write_text("".join(lines[:5]))
    canned.ran.clear()
    canned.best("full")
    assert len(canned.ran) == len(lines) - 5
    assert canned.path.read_text().splitlines(keepends=True) == lines


@pytest.mark.thorough
def test_search_trains_no_held_out_text(texts, monkeypatch, tmp_path):
    seen = set()
    encode = training.encode

    class Stop(Exception):
        pass

    def noted(tokenizer, docs, tasks, device):
        seen.update(doc.text for doc in docs)
        return encode(tokenizer, docs[:4], tasks, device)

    def stop(self, method):
        raise Stop

    monkeypatch.setattr(search, "encode", noted)
    monkeypatch.setattr(search.Search, "best", stop)
    with pytest.raises(Stop):
        search.main(["--folder", str(tmp_path)])
    assert seen == {doc.text for doc in texts.train}


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
def test_search_trains_in_bfloat16_as_in_float32(method, tiny_model, texts):
    task = corpus.TASKS[0]
    data = training.encode(model.load_tokenizer(tiny_model), texts.train[:16], [task], CPU)[task]
    recipe = replace(RECIPES[method], learning_rate=3e-3)
    losses = {}
    for precision in (contextlib.nullcontext, search.autocast):
        torch.manual_seed(0)
        one = model.start_task(None, method, task, tiny_model, CPU, 2, recipe)
        torch.manual_seed(0)
        one.heads[task.name].reset_parameters()
        run = training.Training(one, task, data, recipe, steps=16, batch_size=16, seed=0)
        with precision():
            losses[precision] = [run.step() for _ in range(16)]
    exact, rounded = losses.values()
    assert exact[0] - exact[-1] > 0.05  # it learns, from one batch
    assert rounded == pytest.approx(exact, abs=0.01)


@pytest.mark.skipif(not RECORD.exists(), reason="the search has not been run to its end")
def test_recipes_are_the_choice_of_the_search():
    record = json.loads(RECORD.read_text())
    assert {method: asdict(recipe) for method, recipe in RECIPES.items()} == record["chosen"]
    assert record["rounds"]["steps"] == STEPS
    assert record["rounds"]["batch_size"] == BATCH_SIZE


def test_steps_of_a_training_follow_the_recipe_s_rates(trained):
    classifier, data, _ = trained
    task = corpus.TASKS[0]
    classifier.encoder.set_adapter(task.name)
    one = training.Training(
        classifier, task, data[task], RECIPES["adapters"], steps=20, batch_size=4, seed=0
    )
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in one.optimizer.param_groups])
        one.step()
    recipe = RECIPES["adapters"]
    assert rates[0] == pytest.approx([recipe.learning_rate / 2, recipe.head_learning_rate / 2])
    assert max(rates) == pytest.approx([recipe.learning_rate, recipe.head_learning_rate])
    assert rates[-1] == pytest.approx([recipe.learning_rate / 18, recipe.head_learning_rate / 18])
    with pytest.raises(StopIteration):
        one.step()
    assert len(one.losses) == len(one.seconds) == 20
    assert torch.isfinite(torch.tensor(one.losses)).all()
