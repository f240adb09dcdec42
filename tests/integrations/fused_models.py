"""Models for `fuse_norms`: every adapter random, every norm with weights and an eps of its own."""

import copy

import torch
import transformers as tf
from families import FAMILIES, build, inputs_of
from random_adapters import randomised
from torch import nn

from adapterkern.integrations.transformers import fuse_norms

POST_NORM = ["bert", "roberta", "electra", "mpnet", "deberta", "deberta-v2", "distilbert"]
PRE_NORM = ["llama", "mistral", "qwen2", "gpt2", "opt"]
FOR_FREE = ["qwen3", "gemma", "helium", "smollm3", "arcee", "glm", "ministral", "xlm-roberta"]
NAMES = [*POST_NORM, *PRE_NORM, *FOR_FREE]


def base(name, **options):
    """The tiny model of a family; GPT-2 without cross-attention."""
    if name != "gpt2" and not options:
        return build(name)
    family = FAMILIES[name]
    options = {**family.options, **options}
    options.pop("add_cross_attention", None)
    torch.manual_seed(0)
    return getattr(tf, family.model)(getattr(tf, family.config)(**options))


def inputs(name):
    return {k: v for k, v in inputs_of(name).items() if k != "encoder_hidden_states"}


def norms(model):
    return [m for m in model.modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")]


def uneven(model):
    """Give each norm random parameters and an eps that counts, another for each."""
    generator = torch.Generator().manual_seed(5)
    for place, norm in enumerate(norms(model)):
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        eps = "eps" if hasattr(norm, "eps") else "variance_epsilon"
        setattr(norm, eps, 0.01 * (1 + place % 5))
    return model


def pair(name, prepare=lambda model: model, **fields):
    """The same model as it is and fused, in evaluation mode."""
    model = prepare(randomised(uneven(base(name)), **fields))
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    return model.eval(), fused.eval()


def first(model, **given):
    with torch.no_grad():
        return model(**given)[0]


def rms(tensor):
    return tensor.double().pow(2).mean().sqrt()


def assert_same(found, expected, dtype=torch.float32, least=0.0):
    """Within the rounding of a whole model of two layers, of what is larger than `least`."""
    rounding = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert rms(found.double() - expected.double()) <= rounding * max(rms(expected), least)


def loss_of(model, given):
    """A loss that weighs every number of the first output."""
    value = model(**given)[0]
    weights = torch.linspace(0.3, 1.7, value.numel(), dtype=value.dtype).view_as(value)
    return (value * weights).pow(2).mean()


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model
