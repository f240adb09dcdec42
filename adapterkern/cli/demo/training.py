"""Batches, training loop and evaluation: the same for adapters, LoRA and full fine-tuning."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from adapterkern.cli.demo.corpus import Docstring, Task
from adapterkern.cli.demo.model import MAX_LENGTH, TextClassifier
from adapterkern.cli.demo.progress import Progress

# The best of three rates for each method, a factor of 2 apart, judged on a fifth of the training
# texts set aside, never on the held-out texts. Neighbours are within the noise (2 points).
LEARNING_RATE = {"adapters": 4e-3, "lora": 2e-3, "full": 1e-4}
HEAD_LEARNING_RATE = 5e-3
WARM_UP_SHARE = 0.1
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


def encode(tokenizer, docs: list[Docstring], task: Task, device: torch.device) -> Encoded:
    """The texts cut at MAX_LENGTH tokens; neither names nor signatures are among them."""
    ids = tokenizer([doc.text for doc in docs], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return Encoded(ids, task.targets(docs), tokenizer.pad_token_id, device)


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


@torch.inference_mode()
def logits_of(model: TextClassifier, task: Task, data: Encoded) -> Tensor:
    """[N, classes] on the CPU, in the order of the texts."""
    model.eval()
    order = sorted(range(len(data)), key=lambda row: len(data.ids[row]))
    out = torch.empty(len(data), len(task.labels))
    for start in range(0, len(order), EVALUATION_BATCH):
        rows = order[start : start + EVALUATION_BATCH]
        ids, mask, _ = data.batch(rows)
        out[rows] = model(task.name, ids, mask).float().cpu()
    return out


def accuracy(logits: Tensor, data: Encoded) -> float:
    """Share of the texts whose largest logit is that of their class."""
    return (logits.argmax(1) == torch.tensor(data.targets)).float().mean().item()


def optimizer_for(model: TextClassifier, method: str, task: Task) -> torch.optim.AdamW:
    """AdamW over the encoder's trainable parameters and the task's head, each at its own rate."""
    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    head = list(model.heads[task.name].parameters())
    groups = [
        {"params": encoder, "lr": LEARNING_RATE[method]},
        {"params": head, "lr": HEAD_LEARNING_RATE},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.01)


def train(
    model: TextClassifier,
    method: str,
    task: Task,
    data: Encoded,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    label: str,
) -> tuple[list[float], float]:
    """Train in place, with a linear warm-up, then a linear decay to zero.

    Returns:
        The loss of every step, and the seconds that all steps took.
    """
    torch.manual_seed(seed)
    optimizer = optimizer_for(model, method, task)
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    with Progress(label, steps) as progress:
        for rows in batches(data, batch_size, steps, seed):
            ids, mask, targets = data.batch(rows)
            loss = cross_entropy(model(task.name, ids, mask), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.advance(f"loss {losses[-1]:.3f}")
    return losses, time.perf_counter() - start
