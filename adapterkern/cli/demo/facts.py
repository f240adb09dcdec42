"""What a report says of the machine, the texts and the files."""

import os
import platform
from pathlib import Path

import torch

from adapterkern.cli.demo.corpus import TASKS, Corpus, Task


def machine(device: torch.device) -> dict[str, object]:
    """The machine that the numbers were measured on."""
    is_gpu = device.type == "cuda"
    return {
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if is_gpu else str(device),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def corpus_facts(corpus: Corpus) -> dict[str, object]:
    """Counts of texts, modules and classes."""
    texts = corpus.train + corpus.held_out
    return {
        "texts": len(texts),
        "train": len(corpus.train),
        "held_out": len(corpus.held_out),
        "modules": len(corpus.modules),
        "classes": {
            task.name: {
                label: {"train": train, "held_out": held_out}
                for label, train, held_out in zip(
                    task.labels,
                    task.counts(corpus.train),
                    task.counts(corpus.held_out),
                    strict=True,
                )
            }
            for task in TASKS
        },
    }


def saved_facts(folders: dict[Task, Path], model_bytes: int) -> dict[str, object]:
    """Bytes on disk: an adapter's weights with its head; a whole model's for comparison."""
    weights = {
        task.name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for task, folder in folders.items()
    }
    return {
        "folders": {task.name: str(folder) for task, folder in folders.items()},
        "weight_bytes": weights,
        "adapter_bytes": max(weights.values()),
        "model_bytes": model_bytes,
    }
