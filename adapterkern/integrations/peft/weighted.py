"""A new adapter out of several: the weighted sum of what they add, or of their parameters."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapterkern.integrations.peft.config import BottleneckConfig
from adapterkern.integrations.peft.layer import BottleneckLinear

COMBINATIONS = ("cat", "linear")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_WIDTHS = ("bottleneck_size", "reduction_factor")
# What may differ between adapters that become one: where and how wide they are, what their weights
# take up ("cat"), how they were made and where they come from.
_FREE = {
    "cat": {*_TARGETS, *_WIDTHS, "bias", "scaling"},
    "linear": set(_TARGETS),
}
_OF_NO_MATTER = {
    *("init", "inference_mode", "peft_version", "base_model_name_or_path", "revision"),
    *("auto_mapping", "saved_with", "task_type"),
}

Layers = Mapping[str, BottleneckLinear]


def combined_config(
    model: nn.Module,
    configs: Mapping[str, BottleneckConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
) -> BottleneckConfig:
    """The configuration of the new adapter.

    Raises:
        ValueError: these adapters have no such combination; the message says why.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type must be one of {', '.join(COMBINATIONS)}, got "
            f"{combination_type!r}.\n"
            "  hint: the others of LoRA rely on a low-rank matrix, and an adapter is nonlinear"
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"adapters and weights must be lists of one length, got {len(adapters)} adapters and "
            f"{len(weights)} weights."
        )
    unknown = sorted(set(adapters) - set(configs))
    if unknown:
        raise ValueError(
            f"unknown adapters: {', '.join(unknown)} (this model has {', '.join(configs)})."
        )
    layers = _layers(model)
    problems = _differences(configs, adapters, combination_type, layers)
    if problems:
        raise ValueError(
            f"{', '.join(adapters)} cannot become one adapter by {combination_type!r}:\n  - "
            + "\n  - ".join(problems)
            + "\n  hint: set_adapter([...]) stacks them, adapter_names serves each to its inputs"
        )
    first = configs[adapters[0]]
    changes: dict[str, Any] = {}
    if any(
        getattr(configs[name], key) != getattr(first, key) for name in adapters for key in _TARGETS
    ):
        names = [
            re.escape(key) for key in layers if set(adapters) & set(layers[key].bottleneck_adapter)
        ]
        changes = dict.fromkeys(_TARGETS) | {"target_modules": "|".join(names)}
    if combination_type == "cat":
        widths = [
            sum(one.bottleneck_size for one in _present(layer, adapters))
            for layer in layers.values()
        ]
        changes |= {
            "bottleneck_size": max(widths),
            "reduction_factor": None,
            "scaling": 1.0,
            "bias": any(configs[name].bias for name in adapters),
        }
    return dataclasses.replace(first, **changes)


@torch.no_grad()
def fill(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    new: str,
    combination_type: str,
) -> None:
    """Compute the weights of the new adapter in every layer that has it."""
    for layer in _layers(model).values():
        if new not in layer.bottleneck_adapter:
            continue
        target: Any = layer.bottleneck_adapter[new]
        parts = [
            (layer.bottleneck_adapter[name], weight)
            for name, weight in zip(adapters, weights, strict=True)
            if name in layer.bottleneck_adapter
        ]
        if combination_type == "cat":
            _concatenate(target, parts)
        else:
            for key, parameter in target.named_parameters():
                # In float64, so that an average of equal parameters is that parameter.
                total = sum(part.get_parameter(key).double() * weight for part, weight in parts)
                parameter.copy_(total)
        target.requires_grad_(False)


def _concatenate(target: Any, parts: list[tuple[Any, float]]) -> None:
    """sum_i w_i s_i (U_i act(D_i x + d_i) + u_i): the D_i one above the other, the w_i s_i U_i side
    by side. Units that are left over stay zero and add nothing: their column of U is zero.
    """
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    start = 0
    for part, weight in parts:
        end = start + part.bottleneck_size
        factor = torch.as_tensor(part.scaling, dtype=torch.float64) * weight  # [], [1] or [H]
        target.down_proj.weight[start:end] = part.down_proj.weight
        up = part.up_proj.weight.double() * factor.reshape(-1, 1)
        target.up_proj.weight[:, start:end] = up.to(target.up_proj.weight.dtype)
        if part.down_proj.bias is not None:
            target.down_proj.bias[start:end] = part.down_proj.bias
            target.up_proj.bias += (part.up_proj.bias.double() * factor).to(
                target.up_proj.bias.dtype
            )
        start = end


def _layers(model: nn.Module) -> Layers:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BottleneckLinear)
    }


def _present(layer: BottleneckLinear, adapters: Sequence[str]) -> list[Any]:
    return [layer.bottleneck_adapter[name] for name in adapters if name in layer.bottleneck_adapter]


def _differences(
    configs: Mapping[str, BottleneckConfig],
    adapters: Sequence[str],
    combination_type: str,
    layers: Layers,
) -> list[str]:
    problems = []
    for field in dataclasses.fields(BottleneckConfig):
        values = {str(getattr(configs[name], field.name)): None for name in adapters}
        free = _FREE[combination_type] | _OF_NO_MATTER | {"modules_to_save"}
        if field.name not in free and len(values) > 1:
            problems.append(f"{field.name} is not the same: {', '.join(values)}")
    with_modules = [name for name in adapters if configs[name].modules_to_save]
    if with_modules:
        problems.append(
            f"modules_to_save of {', '.join(with_modules)}: whole modules have no sum to put there"
        )
    for name, layer in layers.items():
        present = _present(layer, adapters)
        if combination_type == "linear" and len(present) not in (0, len(adapters)):
            problems.append(
                f"{name} is adapted by some of them alone, and has no parameters to add"
            )
            break
        if any(weight.is_meta for one in present for weight in one.parameters()):
            problems.append(f"the weights of {name} are offloaded and cannot be read")
            break
    return problems
