"""The layers to adapt: defaults by architecture, and checks that a layer can be adapted."""

import copy
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

_LLAMA = ["self_attn.o_proj", "mlp.down_proj"]
_BERT = ["attention.output.dense", "output.dense"]

# The output projections of attention (self and cross) and of the feed-forward block, as suffixes
# of module names.
DEFAULT_TARGET_MODULES: dict[str, list[str]] = {
    "bert": _BERT,
    "distilbert": ["attention.out_lin", "ffn.lin2"],
    "gemma": _LLAMA,
    "gpt2": ["attn.c_proj", "crossattention.c_proj", "mlp.c_proj"],
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": ["self_attn.out_proj", "fc2"],
    "qwen2": _LLAMA,
    "roberta": _BERT,
    "t5": ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"],
    "vit": [*_BERT, "attention.o_proj", "mlp.fc2"],  # transformers 4, then transformers 5
}


def default_target_modules(model: nn.Module, model_type: str | None) -> list[str]:
    """The default targets of an architecture.

    Raises:
        ValueError: there is none; the message says how to name layers and lists the model's.
    """
    if model_type in DEFAULT_TARGET_MODULES:
        return list(DEFAULT_TARGET_MODULES[model_type])
    names = (name for name, module in model.named_modules() if output_size(module) is not None)
    layers = dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names)
    raise ValueError(
        f"model type {model_type!r} has no default target_modules "
        f"(known: {', '.join(DEFAULT_TARGET_MODULES)}).\n"
        "  hint: BottleneckConfig(target_modules=[...]) takes name suffixes of the linear layers "
        'that adapters should follow, as in ["self_attn.o_proj", "mlp.down_proj"], or one regular '
        'expression, or "all-linear"\n'
        f"  linear layers of this model: {', '.join(layers)}"
    )


def output_size(layer: nn.Module) -> int | None:
    """Width of a linear layer's output, plain or quantised; None for other layers."""
    if isinstance(layer, Conv1D):
        return layer.nf
    for name in ("out_features", "outfeatures", "output_size"):
        size = getattr(layer, name, None)
        if isinstance(size, int):
            return size
    return None


# PEFT adds these heads to modules_to_save for these tasks, whichever of them the model has.
HEADS = ("classifier", "score", "qa_outputs")
TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def check_layers(config: Any, names: list[str], matches: Callable[[Any, str], Any]) -> None:
    """Raise ValueError where layers_to_transform has a layer without a target; PEFT skips those.

    `matches` is PEFT's own rule whether a configuration adapts the module of a name.
    """
    if not config.layers_to_transform:
        return
    probe = copy.copy(config)

    def adapts(layer: int) -> bool:
        probe.layers_to_transform = [layer]
        return any(matches(probe, name) for name in targets)

    probe.layers_to_transform = None
    targets = [name for name in names if matches(probe, name)]
    numbers = {int(part) for name in targets for part in name.split(".") if part.isdigit()}
    there = [layer for layer in sorted(numbers) if adapts(layer)]
    missing = sorted(set(config.layers_to_transform) - set(there))
    if missing and there:  # PEFT itself refuses where nothing matches
        raise ValueError(
            f"layers_to_transform names layers without a target: {', '.join(map(str, missing))}.\n"
            f"  hint: the targets of this model are in layers {', '.join(map(str, there))}"
        )


def check_modules_to_save(config: Any, names: list[str]) -> None:
    """Raise ValueError where modules_to_save has a name that fits no module; PEFT skips those."""
    added = HEADS if config.task_type in TASKS_WITH_HEADS else ()
    unknown = [
        wanted
        for wanted in config.modules_to_save or []
        if wanted not in added and not any(name.endswith(wanted) for name in names)
    ]
    if unknown:
        last = dict.fromkeys(name.rpartition(".")[2] for name in names)
        raise ValueError(
            f"modules_to_save names no module of this model: {', '.join(unknown)}.\n"
            "  hint: its modules end in " + ", ".join(name for name in last if not name.isdigit())
        )


def check_target(name: str, layer: nn.Module, parent: nn.Module) -> None:
    """Raise ValueError where no adapter can follow a layer, or the model would bypass it."""
    if output_size(layer) is None:
        raise ValueError(
            f"cannot adapt {name}: {type(layer).__name__} is no linear layer (no out_features).\n"
            "  hint: let target_modules match linear layers only, or use exclude_modules"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"cannot adapt {name}: nn.MultiheadAttention reads its weights and never calls it.\n"
            "  hint: leave it out with exclude_modules"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu:
        raise ValueError(
            f"cannot adapt {name}: nn.TransformerEncoderLayer reads its weights and does not call "
            "it, in evaluation.\n"
            "  hint: set activation_relu_or_gelu = 0 on each encoder layer, and it is called"
        )
