"""A made-up report of the demo, for what only reads reports."""

from adapterkern.cli.demo import findings, model


def canned_report() -> findings.Report:
    def method(name: str, trained: int) -> findings.MethodResult:
        tasks = [
            findings.TaskResult("topic", 11, 99, 0.09, 0.7, 4.0, [2.4, 1.5, 0.9]),
            findings.TaskResult("kind", 5, 45, 0.15, 0.6, 4.0, [1.6, 1.2, 1.0]),
        ]
        return findings.MethodResult(
            name, model.LABELS[name], trained, 1000, 1e-3, {"rank": 1}, 5 << 20, tasks
        )

    return findings.Report(
        command={"steps": 3, "batch_size": 16, "seed": 0},
        versions={"torch": "2"},
        machine={"device": "cpu"},
        model={"name": "tiny", "type": "BertModel", "hidden_size": 32, "num_adapters": 4,
               "bottleneck_size": 2},
        corpus={"texts": 2461, "modules": 129, "train": 1969, "held_out": 492},
        majority={"topic": 0.105, "kind": 0.305},
        methods=[method("adapters", 10), method("lora", 12), method("full", 1000)],
        checks=[findings.Check("a promise", True, "how", {"errors": {"w": 1e-7}})],
        step_times=[findings.StepTime("float32", [16, 64], "reference", 300.0, 310.0, 3, False)],
        saved={"adapter_bytes": 1 << 20, "model_bytes": 90 << 20},
        peak_is_per_method=True,
        seconds=12.0,
    )  # fmt: skip
