"""The run itself: the methods' contest on both tasks, the checks, the report."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from adapterkern.bench.environment import versions
from adapterkern.cli.demo import checks, mixed, norms
from adapterkern.cli.demo.contest import Contest, Data, Options, base_features
from adapterkern.cli.demo.corpus import TASKS, Corpus, Task, load_corpus
from adapterkern.cli.demo.facts import corpus_facts, machine, saved_facts
from adapterkern.cli.demo.findings import (
    Check,
    Difference,
    MethodResult,
    MixedTime,
    Report,
    StepTime,
    TaskResult,
    write_atomically,
)
from adapterkern.cli.demo.intervals import bootstrap_interval, t_interval
from adapterkern.cli.demo.model import (
    LABELS,
    TextClassifier,
    adapters_of,
    describe_method,
    load_tokenizer,
    save_task,
)
from adapterkern.cli.demo.plot import plot_report
from adapterkern.cli.demo.progress import Progress
from adapterkern.cli.demo.recipes import METHODS, RECIPES
from adapterkern.cli.demo.story import Story
from adapterkern.cli.demo.training import accuracy, encode, evaluation_batches

CHECKED = 3  # every how many batches of held-out texts switching and reloading are checked on


def run(options: Options, story: Story) -> Report:
    """Train, check, save adapters, report.json and report.png to `options.out`.

    Args:
        story: is told what is finished and what is written.

    Raises:
        CorpusError: this Python carries no sources of its standard library.
        ModelError: the base model cannot be loaded or does not fit.
    """
    start = time.perf_counter()
    device, out = torch.device(options.device), Path(options.out)
    corpus, data = load(options, device)
    story.finished.append("reading the texts")
    contest = Contest(options, data)
    for seed in contest.seeds:
        contest.run_seed(seed, TASKS)
        story.finished.append(f"training and judging (seed {seed})")
    model = contest.adapters
    assert model is not None  # there is a seed
    model_facts = {
        "name": options.name,
        "source": options.model,
        "type": type(model.encoder.get_base_model()).__name__,
        "hidden_size": model.encoder.config.hidden_size,
        "num_adapters": len(adapters_of(model.encoder)),
        "bottleneck_size": adapters_of(model.encoder)[0].bottleneck_size,
    }
    with Progress("saving the adapters", len(TASKS), "adapter") as bar:
        folders = {}
        for task in TASKS:
            folders[task] = save_task(model, task, options.model, out / "adapters")
            story.written.append(f"adapters/{task.name}")
            bar.advance()
    verdicts = check(model, folders, contest)
    story.finished.append("the checks")
    step_times, mixed_times = measure(model, data, options)
    story.finished.append("timing")
    report = Report(
        command={**asdict(options), "out": str(options.out)},
        seeds=contest.seeds,
        interval_of="texts" if options.seeds == 1 else "seeds",
        versions=versions(),
        machine=machine(device),
        model=model_facts,
        corpus=corpus_facts(corpus),
        majority={task.name: task.majority_share(corpus.held_out) for task in TASKS},
        methods=[method_result(method, contest) for method in METHODS],
        differences=differences(contest),
        checks=verdicts,
        step_times=step_times,
        mixed_times=mixed_times,
        saved=saved_facts(folders, 4 * contest.num_base),  # float32
        seconds=time.perf_counter() - start,
    )
    files: dict[str, Callable[[Path], object]] = {
        "report.json": lambda path: path.write_text(report.to_json()),
        "report.png": lambda path: plot_report(report, path),
    }
    with Progress("writing the report", len(files), "file") as bar:
        for name, write in files.items():
            write_atomically(out / name, write)
            story.written.append(name)
            bar.advance()
    return report


def load(options: Options, device: torch.device) -> tuple[Corpus, Data]:
    """The texts, encoded; the tokenizer is loaded first, for a model that cannot be."""
    known = Path(options.model).is_dir()
    where = (
        "" if known else f", looking for {options.model} in the cache and on the Hugging Face hub"
    )
    with Progress(f"loading the tokenizer{where}"):
        tokenizer = load_tokenizer(options.model)
    with Progress("reading the docstrings of the standard library"):
        corpus = load_corpus()
    corpus = Corpus(corpus.train, corpus.held_out[: options.held_out])
    with Progress("encoding the texts", 2, "half") as bar:
        train = encode(tokenizer, corpus.train, TASKS, device)
        bar.advance()
        held_out = encode(tokenizer, corpus.held_out, TASKS, device)
        bar.advance()
    features = base_features(options.model, held_out[TASKS[0]])
    return corpus, Data(train, held_out, features)


def check(model: TextClassifier, folders: dict[Task, Path], contest: Contest) -> list[Check]:
    """All checks of the trained adapters that go with this model."""
    options, data = contest.options, contest.data
    batches = evaluation_batches(data.held_out[TASKS[0]])[::CHECKED]
    rows = [row for batch in batches for row in batch]
    some = {task: data.held_out[task].take(rows) for task in TASKS}
    recorded = {
        task: contest.outcomes["adapters", task.name, options.seed].logits[rows] for task in TASKS
    }
    task, texts = TASKS[-1], data.train[TASKS[-1]]
    todo: list[Callable[[], Check | None]] = [
        lambda: checks.check_switching(model, some, recorded),
        lambda: checks.check_reload(folders, options.model, some, recorded),
        lambda: checks.check_gradients(model, task, texts, options.batch_size),
        lambda: norms.check_norms(model, task, texts, options.batch_size),
    ]
    found = []
    with Progress("checking", len(todo) + 1, "check") as bar:
        for one in todo:
            found.append(one())
            bar.advance()
        with mixed.open_mixed_batch(model, texts) as batch:
            found.append(mixed.check_mixed(batch))
        bar.advance()
    return [verdict for verdict in found if verdict is not None]


def measure(
    model: TextClassifier, data: Data, options: Options
) -> tuple[list[StepTime], list[MixedTime]]:
    """Times of a mixed batch, of a forward and of a training step; the last changes the model."""
    task, texts = TASKS[-1], data.train[TASKS[-1]]
    timing = model, task, texts, options.batch_size, options.timing_repeats
    with mixed.open_mixed_batch(model, texts) as batch:
        mixed_times = mixed.time_mixed(batch, options.timing_repeats)
    return [*norms.time_forwards(*timing), *checks.time_steps(*timing)], mixed_times


def method_result(method: str, contest: Contest) -> MethodResult:
    """What a method reached on each task, over the seeds."""
    outcomes = [one for (name, *_), one in contest.outcomes.items() if name == method]
    peaks = [one.peak_bytes for one in outcomes if one.peak_bytes is not None]
    trained = outcomes[0].trained
    return MethodResult(
        method=method,
        label=LABELS[method],
        trained=trained,
        total=contest.num_base + (trained if method != "full" else 0),
        learning_rate=RECIPES[method].learning_rate,
        settings=describe_method(method, contest.lora_rank),
        step_ms=1e3 * statistics.median(s for one in outcomes for s in one.seconds),
        peak_bytes=max(peaks) if peaks else None,
        tasks=[_task_result(method, task, contest) for task in TASKS],
    )


def _task_result(method: str, task: Task, contest: Contest) -> TaskResult:
    held_out = contest.data.held_out[task]
    runs = [contest.outcomes[method, task.name, seed] for seed in contest.seeds]
    by_seed = [accuracy(run.logits, held_out) for run in runs]
    return TaskResult(
        task=task.name,
        num_classes=len(task.labels),
        head=(contest.data.features.shape[1] + 1) * len(task.labels),
        before=statistics.mean(accuracy(run.before, held_out) for run in runs),
        after=statistics.mean(by_seed),
        interval=_interval(by_seed, right(method, task, contest)),
        by_seed=by_seed,
        losses=runs[0].losses,
    )


def differences(contest: Contest) -> list[Difference]:
    """The adapters less each other method, on each task: paired, by texts or by seeds."""
    found = []
    for task in TASKS:
        ours = right("adapters", task, contest)
        for method in METHODS[1:]:
            apart = ours - right(method, task, contest)  # [seeds, N]
            by_seed = [float(one) for one in apart.mean(1)]
            interval = _interval(by_seed, apart)
            found.append(Difference(task.name, method, statistics.mean(by_seed), interval))
    return found


def right(method: str, task: Task, contest: Contest) -> np.ndarray:
    """[seeds, N]: 1.0 where the method tells a held-out text's class, else 0.0."""
    targets = torch.tensor(contest.data.held_out[task].targets)
    logits = [contest.outcomes[method, task.name, seed].logits for seed in contest.seeds]
    return np.stack([(one.argmax(1) == targets).double().numpy() for one in logits])


def _interval(by_seed: list[float], by_text: np.ndarray) -> list[float]:
    return bootstrap_interval(by_text[0]) if len(by_seed) == 1 else t_interval(by_seed)
