"""A made-up report of the demo, for what only reads reports."""

import dataclasses
import math
import random
from typing import Any

from adapterkern.cli.demo import findings, model

# method: trained parameters, ms of a step, and by task accuracy and half its interval
METHODS = {
    "adapters": (226_368, 181.0, (0.691, 0.041), (0.652, 0.042)),
    "lora": (221_184, 205.0, (0.697, 0.040), (0.669, 0.041)),
    "full": (22_565_376, 243.0, (0.738, 0.039), (0.665, 0.041)),
}
RATES = {"adapters": 4e-3, "lora": 2e-3, "full": 1e-4}
TASKS = {"topic": (11, 0.091), "kind": (5, 0.152)}  # classes, accuracy before training


def canned_report(steps: int = 120, seeds: int = 1, **changes: Any) -> findings.Report:
    """`changes` replace fields of the report."""
    differences = [
        findings.Difference("topic", "lora", -0.006, [-0.031, 0.019]),
        findings.Difference("topic", "full", -0.047, [-0.078, -0.016]),
        findings.Difference("kind", "lora", -0.017, [-0.045, 0.011]),
        findings.Difference("kind", "full", -0.013, [-0.044, 0.018]),
    ]
    report = findings.Report(
        command={"steps": steps, "batch_size": 16, "out": "adapterkern-demo", "model": "base"},
        seeds=list(range(seeds)),
        interval_of="texts" if seeds == 1 else "seeds",
        versions={"adapterkern": "0.1.0", "torch": "2.13.0+cpu"},
        machine={"device": "cpu", "processor": "x86_64", "torch_threads": 2},
        model={"name": "MiniLM-L6", "type": "BertModel", "hidden_size": 384, "num_adapters": 12,
               "bottleneck_size": 24},
        corpus={"texts": 2461, "modules": 129, "train": 1969, "held_out": 492},
        majority={"topic": 0.105, "kind": 0.305},
        methods=[_method(name, steps, seeds) for name in METHODS],
        differences=differences,
        checks=[findings.Check("saved adapters reload into a fresh base model, bit for bit", True,
                               "topic and kind, each into a base model of its own",
                               {"errors": {"w": 1e-7}})],
        step_times=[findings.StepTime("float32", [16, 48], "reference", 181.0, 177.0, 7, False)],
        saved={"folders": {task: f"adapterkern-demo/adapters/{task}" for task in TASKS},
               "adapter_bytes": 935_212, "model_bytes": 90_261_504},
        seconds=272.0,
    )  # fmt: skip
    return dataclasses.replace(report, **changes)


def _method(name: str, steps: int, seeds: int) -> findings.MethodResult:
    trained, step_ms, *scores = METHODS[name]
    total = METHODS["full"][0] + (trained if name != "full" else 0)
    tasks = []
    for (task, (classes, before)), (after, half) in zip(TASKS.items(), scores, strict=True):
        draws = random.Random(f"{name} {task}")
        half = half if seeds == 1 else half / 3
        tasks.append(
            findings.TaskResult(
                task, classes, 385 * classes, before, after, [after - half, after + half],
                [after + half * draws.uniform(-1, 1) for _ in range(seeds)],
                losses=[
                    (0.8 + (math.log(classes) - 0.8) * math.exp(-step / 30)) * draws.gauss(1, 0.2)
                    for step in range(steps)
                ],
            )
        )  # fmt: skip
    return findings.MethodResult(
        name, model.LABELS[name], trained, total, RATES[name], {"rank": 1}, step_ms, None, tasks
    )
