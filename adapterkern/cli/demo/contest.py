"""The methods side by side: trained in turn, judged on the same texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from adapterkern.cli.demo.corpus import Task
from adapterkern.cli.demo.model import (
    TextClassifier,
    load_encoder,
    lora_rank_for,
    num_trained,
    start_task,
)
from adapterkern.cli.demo.progress import Progress
from adapterkern.cli.demo.recipes import METHODS, RECIPES
from adapterkern.cli.demo.training import (
    Encoded,
    Training,
    evaluation_batches,
    logits_of,
    outputs_of,
)

SHORT = {"adapters": "adapters", "lora": "LoRA", "full": "full"}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Options:
    """The user's choices; `model` is a folder or a hub name, `name` its title."""

    out: str
    model: str
    name: str
    device: str
    seed: int  # the first
    seeds: int
    steps: int
    batch_size: int
    held_out: int | None  # how many held-out texts to judge by; None: all
    timing_repeats: int


@dataclass
class Data:
    """Both halves of the corpus, encoded for each task; what the bare model makes of the second."""

    train: dict[Task, Encoded]
    held_out: dict[Task, Encoded]
    features: Tensor  # [N, H], on the CPU: of the held-out texts


@dataclass
class Outcome:
    """One method on one task from one seed."""

    trained: int  # parameters, without the head
    before: Tensor  # [N, classes]: the held-out logits of the base model under the untrained head
    logits: Tensor  # [N, classes]: those after training
    losses: list[float]
    seconds: list[float]  # of each step
    peak_bytes: int | None


@dataclass
class Contest:
    """All methods on all tasks, from each seed.

    outcomes: by method, task and seed.
    adapters: the model of the first seed, with the adapters of both tasks.
    """

    options: Options
    data: Data
    budget: int = 0  # parameters that the adapters of a task have
    lora_rank: int = 0
    num_base: int = 0  # parameters of the base model
    outcomes: dict[tuple[str, str, int], Outcome] = field(default_factory=dict)
    adapters: TextClassifier | None = None

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of their runs."""
        return list(range(self.options.seed, self.options.seed + self.options.seeds))

    def run_seed(self, seed: int, tasks: Sequence[Task]) -> None:
        """Train every method on the tasks, one after the other, and judge it after each."""
        models: dict[str, TextClassifier | None] = dict.fromkeys(METHODS)
        for task in tasks:
            models["full"] = None  # frees the last task's model before the next is loaded
            with Progress(f"starting {task.name} (seed {seed})", len(METHODS), "method") as bar:
                for method in METHODS:
                    models[method] = self._start(models[method], method, task, seed)
                    bar.advance()
            started = {method: model for method, model in models.items() if model is not None}
            self._train_in_turn(started, task, seed)
        if self.adapters is None:
            self.adapters = models["adapters"]

    def _start(
        self, model: TextClassifier | None, method: str, task: Task, seed: int
    ) -> TextClassifier:
        options = self.options
        if method == "lora" and not self.lora_rank:
            self.lora_rank = lora_rank_for(self.budget, options.model)
        torch.manual_seed(seed)
        device = torch.device(options.device)
        model = start_task(model, method, task, options.model, device, self.lora_rank)
        if method == "adapters":
            self.budget, self.num_base = num_trained(model.encoder), model.num_base
        torch.manual_seed(seed)
        model.heads[task.name].reset_parameters()  # the same head for every method to start from
        return model

    def _train_in_turn(self, models: dict[str, TextClassifier], task: Task, seed: int) -> None:
        options, held_out = self.options, self.data.held_out[task]
        trainings = {
            method: Training(
                model, task, self.data.train[task], RECIPES[method],
                steps=options.steps, batch_size=options.batch_size, seed=seed,
            )
            for method, model in models.items()
        }  # fmt: skip
        before = _under(models["full"].heads[task.name], self.data.features)
        total = options.steps * len(models)
        with Progress(f"training on {task.name} (seed {seed})", total) as bar:
            for number in range(options.steps):
                for method in rotated(list(models), number):
                    loss = trainings[method].step()
                    bar.advance(f"loss of {SHORT[method]} {loss:.2f}")
        total = len(models) * len(evaluation_batches(held_out))
        with Progress(f"judging on {task.name} (seed {seed})", total, "batch") as bar:
            for method, model in models.items():
                training = trainings[method]
                self.outcomes[method, task.name, seed] = Outcome(
                    trained=num_trained(model.encoder),
                    before=before,
                    logits=logits_of(model, task, held_out, bar),
                    losses=training.losses,
                    seconds=training.seconds,
                    peak_bytes=training.peak_bytes,
                )


def rotated(items: list[Item], by: int) -> list[Item]:
    """The items from number `by` on, the first ones behind the last: each comes first in turn, and
    so does what the one before it leaves in the caches."""
    by %= len(items)
    return items[by:] + items[:by]


def base_features(source: str, data: Encoded) -> Tensor:
    """[N, H] on the CPU: what the bare model makes of the texts, which heads start from."""
    model = TextClassifier(load_encoder(source, data.device))
    with Progress("reading the held-out texts", len(evaluation_batches(data)), "batch") as bar:
        size = model.encoder.config.hidden_size
        return outputs_of(model, model.features, size, data, bar)


@torch.inference_mode()
def _under(head: nn.Linear, features: Tensor) -> Tensor:
    return head(features.to(head.weight.device)).cpu()
