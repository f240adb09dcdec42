"""Processes that save into one folder, are killed, and read it: run by test_peft_interrupted.py.

python peft_folder_races.py kills|readers|same-settings FOLDER LOADS prints what was seen by that
many loads, and by more until each model was seen that often: how fast a machine is decides nothing.
"""

import json
import os
import random
import signal
import sys
import time

import peft
import torch
import transformers
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig

ACTIVATIONS = ("relu", "tanh")
IDS = torch.arange(3, 13).view(2, 5)


def base():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=61,
    )
    return transformers.BertModel(config).eval()


def adapted(activation, seed):
    model = peft.get_peft_model(
        base(), BottleneckConfig(bottleneck_size=4, activation=activation)
    ).eval()
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "bottleneck_adapter" in name:
            nn.init.normal_(weight)
    return model


def output(model):
    with torch.no_grad():
        return model(IDS)[0]


def start_writer(models, folder):
    """Fork a process that saves one model after another until it is killed."""
    writer = os.fork()
    if writer == 0:
        while True:
            for model in models:
                model.save_pretrained(folder)
    return writer


def stop(writer):
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)


def load(folder, expected, seen):
    """Load the folder and count which of the models it was."""
    try:
        found = output(peft.PeftModel.from_pretrained(base(), folder))
    except ValueError as error:
        key = "refused" if "saved anew while it was being loaded" in str(error) else str(error)
    else:
        whole = [index for index, one in enumerate(expected) if torch.equal(found, one)]
        key = f"model {whole[0]}" if whole else "mixture"
    seen[key] = seen.get(key, 0) + 1


def saving_takes(models, folder):
    """Seconds of a save, on this machine with what else it has to do."""
    start = time.monotonic()
    for model in models:
        model.save_pretrained(folder)
    return (time.monotonic() - start) / len(models)


def main(what, folder, loads):
    torch.set_num_threads(1)
    activations = ACTIVATIONS if what != "same-settings" else ("relu", "relu")
    models = [adapted(activation, seed) for seed, activation in enumerate(activations)]
    expected = [output(model) for model in models]
    once = saving_takes(models[::-1], folder)
    instants = random.Random(0)
    seen: dict[str, int] = {}
    writers = []
    names = [f"model {index}" for index in range(len(models))]
    if what != "kills":
        writers = [start_writer(order, folder) for order in (models, models[::-1])]
    while sum(seen.values()) < int(loads) or min(seen.get(name, 0) for name in names) < 6:
        if what == "kills":
            writer = start_writer(models, folder)
            time.sleep(instants.uniform(0, 3 * once))
            stop(writer)
        load(folder, expected, seen)
    for writer in writers:
        stop(writer)
    models[0].save_pretrained(folder)
    print(json.dumps({"seen": seen, "files": sorted(os.listdir(folder))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
