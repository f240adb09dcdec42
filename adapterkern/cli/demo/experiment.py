"""The run itself: three ways of training on two tasks, the checks, the report."""

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapterkern.bench.environment import versions
from adapterkern.cli.demo import checks, mixed, norms
from adapterkern.cli.demo.corpus import TASKS, Corpus, Task, load_corpus
from adapterkern.cli.demo.findings import MethodResult, Report, TaskResult, write_atomically
from adapterkern.cli.demo.memory import peak_bytes, peak_is_per_part, reset_peak
from adapterkern.cli.demo.model import (
    LABELS,
    METHODS,
    TextClassifier,
    adapters_of,
    describe_method,
    load_tokenizer,
    lora_rank_for,
    num_trained,
    save_task,
    start_task,
)
from adapterkern.cli.demo.plot import plot_report
from adapterkern.cli.demo.training import LEARNING_RATE, Encoded, accuracy, encode, logits_of, train


@dataclass(frozen=True)
class Options:
    """The user's choices; `model` is a folder or a hub name, `name` its title."""

    out: Path
    model: str
    name: str
    device: str
    seed: int
    steps: int
    batch_size: int
    held_out: int | None  # how many held-out texts to judge by; None: all
    timing_repeats: int


@dataclass
class Data:
    """Both halves of the corpus, encoded for each task."""

    train: dict[Task, Encoded]
    held_out: dict[Task, Encoded]


@dataclass
class Trained:
    """A method's result, its last model, and the held-out logits after each task's training."""

    result: MethodResult
    model: TextClassifier
    recorded: dict[Task, Tensor]


def run(options: Options) -> Report:
    """Train, check, save adapters, report.json and report.png to `options.out`.

    Raises:
        CorpusError: this Python carries no sources of its standard library.
        ModelError: the base model cannot be loaded or does not fit.
    """
    start = time.perf_counter()
    device = torch.device(options.device)
    if not Path(options.model).is_dir():
        _say(f"looking for {options.model} in the cache and on the Hugging Face hub")
    tokenizer = load_tokenizer(options.model)
    _say("reading the docstrings of the standard library")
    corpus = load_corpus()
    corpus = Corpus(corpus.train, corpus.held_out[: options.held_out])
    data = Data(
        {task: encode(tokenizer, corpus.train, task, device) for task in TASKS},
        {task: encode(tokenizer, corpus.held_out, task, device) for task in TASKS},
    )
    adapters = run_method("adapters", options, data, lora_rank=0)
    model = adapters.model
    model_facts = {
        "name": options.name,
        "source": options.model,
        "type": type(model.encoder.get_base_model()).__name__,
        "hidden_size": model.encoder.config.hidden_size,
        "num_adapters": len(adapters_of(model.encoder)),
        "bottleneck_size": adapters_of(model.encoder)[0].bottleneck_size,
    }
    _say("saving, switching, reloading, comparing gradients, timing steps")
    folders = {t: save_task(model, t, options.model, options.out / "adapters") for t in TASKS}
    task, texts = TASKS[-1], data.train[TASKS[-1]]
    verdicts = [
        checks.check_switching(model, data.held_out, adapters.recorded),
        checks.check_reload(folders, options.model, data.held_out, adapters.recorded),
        checks.check_gradients(model, task, texts, options.batch_size),
        norms.check_norms(model, task, texts, options.batch_size),
    ]
    with mixed.open_mixed_batch(model, texts) as batch:
        verdicts.append(mixed.check_mixed(batch))
        mixed_times = mixed.time_mixed(batch, options.timing_repeats)
    timing = model, task, texts, options.batch_size, options.timing_repeats
    step_times = [*norms.time_forwards(*timing), *checks.time_steps(*timing)]
    base_bytes = 4 * model.num_base  # float32
    del model, batch, adapters.model
    rank = lora_rank_for(adapters.result.trained, options.model)
    others = [run_method(m, options, data, rank).result for m in METHODS if m != "adapters"]
    report = Report(
        command={**asdict(options), "out": str(options.out)},
        versions=versions(),
        machine=machine(device),
        model=model_facts,
        corpus=corpus_facts(corpus),
        majority={task.name: task.majority_share(corpus.held_out) for task in TASKS},
        methods=[adapters.result, *others],
        checks=[verdict for verdict in verdicts if verdict is not None],
        step_times=step_times,
        mixed_times=mixed_times,
        saved=saved_facts(folders, base_bytes),
        peak_is_per_method=peak_is_per_part(device),
        seconds=time.perf_counter() - start,
    )
    write_atomically(options.out / "report.json", lambda path: path.write_text(report.to_json()))
    write_atomically(options.out / "report.png", lambda path: plot_report(report, path))
    return report


def run_method(method: str, options: Options, data: Data, lora_rank: int) -> Trained:
    """Train `method` on the tasks, one after the other, and judge each when its training ends."""
    device = torch.device(options.device)
    reset_peak(device)
    model: TextClassifier | None = None
    results, recorded = [], {}
    for task in TASKS:
        if method == "full":
            model = None  # frees the last task's model before the next is loaded
        torch.manual_seed(options.seed)
        model = start_task(model, method, task, options.model, device, lora_rank)
        torch.manual_seed(options.seed)
        model.heads[task.name].reset_parameters()  # the same head for every method to start from
        before = accuracy(logits_of(model, task, data.held_out[task]), data.held_out[task])
        losses, seconds = train(
            model,
            method,
            task,
            data.train[task],
            steps=options.steps,
            batch_size=options.batch_size,
            seed=options.seed,
            label=f"{LABELS[method]}, {task.name}",
        )
        recorded[task] = logits_of(model, task, data.held_out[task])
        after = accuracy(recorded[task], data.held_out[task])
        results.append(
            TaskResult(
                task=task.name,
                num_classes=len(task.labels),
                head=num_trained(model.heads[task.name]),
                before=before,
                after=after,
                seconds=seconds,
                losses=losses,
            )
        )
    assert model is not None  # there are tasks
    trained = num_trained(model.encoder)
    result = MethodResult(
        method=method,
        label=LABELS[method],
        trained=trained,
        total=model.num_base + (trained if method != "full" else 0),
        learning_rate=LEARNING_RATE[method],
        settings=describe_method(method, lora_rank),
        peak_bytes=peak_bytes(device),
        tasks=results,
    )
    return Trained(result, model, recorded)


def _say(stage: str) -> None:
    print(stage, file=sys.stderr, flush=True)
