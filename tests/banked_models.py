"""Models with banks of adapters behind their layers."""

import torch
from torch import nn

import adapterkern as ak
from tests.banks import random_adapter

H, B, L = 12, 4, 3
NAMES = ("wide", "narrow")
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # of float64: sums in another order, and no more


class Block(nn.Module):
    """The hidden states are [B, L, H] behind `out`, [B L, H] behind `fc`, [B, H] behind `pool`."""

    def __init__(self):
        super().__init__()
        self.out, self.fc, self.pool = (nn.Linear(H, H) for _ in range(3))

    def forward(self, x):
        x = x + self.out(x)
        x = x + self.fc(x.flatten(0, 1)).tanh().view_as(x)
        return x + self.pool(x[:, 0]).unsqueeze(1)


LAYERS = ["out", "fc", "pool"]
PLACES = [f"{block}.{layer}" for block in (0, 1) for layer in LAYERS]


def model_of(blocks=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).double()


def input_of(batch=B):
    return torch.randn(batch, L, H, dtype=torch.float64)


def random_adapters(units, places=PLACES, **options):
    options = {"dtype": torch.float64, "activation": "relu"} | options
    return {place: random_adapter(units, H, **options) for place in places}


def banked(model=None, **options):
    """A model with banks that have two random adapters."""
    model = model_of() if model is None else model
    banks = ak.insert_banks(model, LAYERS, slots=3, activation="relu", **options)
    for name, units in zip(NAMES, (5, 2), strict=True):
        banks.add(name, random_adapters(units))
    return model, banks


def alone(banks, x, name):
    """The base model, with the adapters of that name inserted as single ones."""
    model = model_of()
    if name is not None:
        units = banks[PLACES[0]][name].bottleneck_size
        there = ak.insert(model, LAYERS, bottleneck_size=units, activation="relu")
        for place in PLACES:
            saved = banks[place][name].state_dict()
            there[f"{place}.adapter"].load_state_dict(saved)
    return model(x)


def linear_layers():
    """Two layers with a bank each, and their banks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H)).double()
    banks = ak.insert_banks(model, ["0", "1"], slots=2, activation="relu")
    for name in NAMES:
        banks.add(name, random_adapters(4, ["0", "1"]))
    return model, banks


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
