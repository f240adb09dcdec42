"""How each method is trained: what a search on the training texts alone chose."""

from dataclasses import dataclass, field
from typing import Any

METHODS = ("adapters", "lora", "full")
STEPS = 100  # of 16 texts, for each task and method: about one epoch; the search's as well
BATCH_SIZE = 16


@dataclass(frozen=True)
class Recipe:
    """One way of training a method.

    Args:
        name: of its shape, as the search calls it.
        learning_rate: the highest of the schedule, for all but the head.
        head_learning_rate: the highest for the task's linear head.
        settings: of adapters, arguments of `BottleneckConfig`; of LoRA, `alpha_over_rank` and
            `target_modules`, its rank follows from the adapters' number of parameters; of full
            fine-tuning, none.
    """

    name: str
    learning_rate: float
    head_learning_rate: float = 5e-3
    settings: dict[str, Any] = field(default_factory=dict)


# The choice of `python -m benchmarks.demo_recipe`, which trained on four fifths of the training
# texts and judged on the rest: benchmarks/results/demo/recipe.json.
RECIPES = {
    "adapters": Recipe(
        "parallel",
        2e-3,
        1e-2,
        {"placement": "parallel", "reduction_factor": 8, "init": "identity", "scaling": 4.0},
    ),
    "lora": Recipe(
        "all-linear, alpha 4r", 2e-3, 1e-2, {"alpha_over_rank": 4, "target_modules": "all-linear"}
    ),
    "full": Recipe("head 0.01", 2e-4, 1e-2),
}
