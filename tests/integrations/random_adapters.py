"""PEFT models with random adapters."""

import peft
import torch
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig


def randomised(base, name="default", **fields):
    """Return the base model with one adapter whose every weight is random."""
    model = peft.get_peft_model(base, BottleneckConfig(**fields), name).eval()
    torch.manual_seed(2)
    for key, parameter in model.named_parameters():
        if "bottleneck_adapter" in key or "modules_to_save" in key:
            nn.init.normal_(parameter, std=0.2)
    return model
