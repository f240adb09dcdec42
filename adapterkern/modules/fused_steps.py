"""Keeps torch's fused optimizers from parameters with gaps, which they would update wrongly."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


@functools.cache
def refuse_fused_steps() -> None:
    """From now on, let no fused optimizer step where parameters have gaps.

    Those of torch take a parameter and its state for one block each: they would write one slot's
    update into another slot, and say nothing.
    """
    register_optimizer_step_pre_hook(_check_step)


def _check_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and _has_gaps(parameter):
                raise RuntimeError(
                    "a fused optimizer takes parameters without gaps, got one of shape "
                    f"{list(parameter.shape)} with strides {list(parameter.stride())}: it has "
                    "fewer units than its bank.\n  hint: fused=False, or an AdapterBank whose "
                    "max_bottleneck_size is that of the adapters."
                )


def _has_gaps(tensor: Tensor) -> bool:
    sizes, strides = tensor.shape, tensor.stride()
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return reach >= tensor.numel() > 0
