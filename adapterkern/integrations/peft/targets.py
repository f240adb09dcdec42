"""Which layers are adapted: defaults by architecture, and what can be adapted at all."""

import re

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
    """The architecture's default.

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


def check_target(name: str, layer: nn.Module, parent: nn.Module) -> None:
    """Raise ValueError where no adapter can follow a layer or the model would pass it by."""
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
