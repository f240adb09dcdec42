"""Batches, training loop and evaluation: the same for adapters, LoRA and full fine-tuning."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from adapterkern.cli.demo.corpus import Docstring, Task
from adapterkern.cli.demo.memory import peak_bytes, reset_peak
from adapterkern.cli.demo.model import MAX_LENGTH, TextClassifier
from adapterkern.cli.demo.progress import Progress
from adapterkern.cli.demo.recipes import Recipe

WARM_UP_SHARE = 0.1
STEPS_APART = 1_000_003  # between the seeds of the steps of two runs
POOL = 8  # batches whose texts are sorted by length together, so that a batch is padded little
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts with their class numbers."""

    ids: list[list[int]]
    targets: list[int]
    pad_id: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """ids, mask [B, L] and targets [B], padded on the right to the batch's longest text."""
        texts = [torch.tensor(self.ids[row]) for row in rows]
        ids = pad_sequence(texts, batch_first=True, padding_value=self.pad_id)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        targets = torch.tensor([self.targets[row] for row in rows])
        return ids.to(self.device), mask.to(self.device), targets.to(self.device)

    def take(self, rows: list[int]) -> "Encoded":
        """The texts of these rows alone."""
        return replace(
            self, ids=[self.ids[r] for r in rows], targets=[self.targets[r] for r in rows]
        )


def encode(
    tokenizer, docs: list[Docstring], tasks: Sequence[Task], device: torch.device
) -> dict[Task, Encoded]:
    """The texts with the classes of each task, cut at MAX_LENGTH tokens; neither names nor
    signatures are among them."""
    ids = tokenizer([doc.text for doc in docs], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    pad = tokenizer.pad_token_id
    return {task: Encoded(ids, task.targets(docs), pad, device) for task in tasks}


def batches(data: Encoded, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of rows, epoch after epoch, similar lengths together, ordered by `seed`."""
    order = random.Random(seed)
    served = 0
    while True:
        rows = list(range(len(data)))
        order.shuffle(rows)
        pools = [rows[i : i + POOL * size] for i in range(0, len(rows), POOL * size)]
        epoch = []
        for pool in pools:
            pool.sort(key=lambda row: len(data.ids[row]))
            epoch += [pool[i : i + size] for i in range(0, len(pool), size)]
        order.shuffle(epoch)
        for batch in epoch:
            if served == steps:
                return
            served += 1
            yield batch


def evaluation_batches(data: Encoded) -> list[list[int]]:
    """The rows in batches of like length, the shortest first."""
    order = sorted(range(len(data)), key=lambda row: len(data.ids[row]))
    return [order[i : i + EVALUATION_BATCH] for i in range(0, len(order), EVALUATION_BATCH)]


@torch.inference_mode()
def outputs_of(
    model: TextClassifier,
    call: Callable[[Tensor, Tensor], Tensor],
    size: int,
    data: Encoded,
    progress: Progress | None = None,
) -> Tensor:
    """[N, size] on the CPU, in the order of the texts: what `call` makes of ids and mask.

    progress: advances by every batch of `evaluation_batches`.
    """
    model.eval()
    out = torch.empty(len(data), size)
    for rows in evaluation_batches(data):
        ids, mask, _ = data.batch(rows)
        out[rows] = call(ids, mask).float().cpu()
        if progress is not None:
            progress.advance()
    return out


def logits_of(
    model: TextClassifier, task: Task, data: Encoded, progress: Progress | None = None
) -> Tensor:
    """[N, classes] on the CPU, in the order of the texts."""
    return outputs_of(model, partial(model, task.name), len(task.labels), data, progress)


def accuracy(logits: Tensor, data: Encoded) -> float:
    """Share of the texts whose largest logit is that of their class."""
    return (logits.argmax(1) == torch.tensor(data.targets)).float().mean().item()


def optimizer_for(model: TextClassifier, task: Task, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the encoder's trainable parameters and the task's head, each at its own rate."""
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    head = list(model.heads[task.name].parameters())
    groups = [
        {"params": encoder, "lr": recipe.learning_rate},
        {"params": head, "lr": recipe.head_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.01)


class Training:
    """The training of one task with one method, a step at a time, so that methods can take turns.

    The rates rise linearly for a tenth of the steps and fall linearly to zero. Batches and dropout
    follow from the seed and the number of the step: what others do in between changes nothing.
    """

    def __init__(
        self,
        model: TextClassifier,
        task: Task,
        data: Encoded,
        recipe: Recipe,
        *,
        steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.task, self.data, self.seed = model, task, data, seed
        self.optimizer = optimizer_for(model, task, recipe)
        warm_up = max(1, round(WARM_UP_SHARE * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up)),
        )
        self.batches = batches(data, batch_size, steps, seed)
        self.losses: list[float] = []
        self.seconds: list[float] = []  # of each step
        self.peak_bytes: int | None = None  # on a GPU, of the step that took the most

    def step(self) -> float:
        """Take the next step, and return its loss.

        Raises:
            StopIteration: all steps are done.
        """
        rows = next(self.batches)
        device = self.data.device
        torch.manual_seed(STEPS_APART * self.seed + len(self.losses))
        self.model.train()
        reset_peak(device)
        start = time.perf_counter()
        ids, mask, targets = self.data.batch(rows)
        loss = cross_entropy(self.model(self.task.name, ids, mask), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())  # waits for a GPU
        self.seconds.append(time.perf_counter() - start)
        peak = peak_bytes(device)
        self.peak_bytes = peak if peak is None else max(peak, self.peak_bytes or 0)
        return self.losses[-1]
