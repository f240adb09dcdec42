"""Contests of the demo's methods on the tiny model."""

import torch

from adapterkern.cli.demo import contest, corpus, model, training

CPU = torch.device("cpu")


def options(tiny_model: str, **changes) -> contest.Options:
    """Three steps with the tiny model; `changes` replace fields."""
    given = {
        "out": "", "model": tiny_model, "name": "tiny", "device": "cpu", "seed": 0, "seeds": 1,
        "steps": 3, "batch_size": 8, "held_out": 24, "timing_repeats": 1,
    }  # fmt: skip
    return contest.Options(**{**given, **changes})


def run_contest(tiny_model: str, texts: corpus.Corpus, **changes) -> contest.Contest:
    """Both tasks under every method, trained on the texts that they are judged by."""
    tokenizer = model.load_tokenizer(tiny_model)
    data = training.encode(tokenizer, texts.held_out[:24], corpus.TASKS, CPU)
    features = contest.base_features(tiny_model, data[corpus.TASKS[0]])
    run = contest.Contest(options(tiny_model, **changes), contest.Data(data, data, features))
    for seed in run.seeds:
        run.run_seed(seed, corpus.TASKS)
    return run
