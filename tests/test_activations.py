"""adapterkern.activations: values and gradients against torch, names and aliases."""

import re
from pathlib import Path

import pytest
import torch
from eager import ACTIVATIONS as TORCH_ACTIVATIONS
from special_values import grid_of_special_values

from adapterkern.activations import ACTIVATIONS, canonical_name

# Across the sign, the kinks, and far into both tails, where exp and products overflow first.
POINTS = torch.tensor(
    [-40.0, -9.5, -3.0, -1.0, -1e-3, -0.0, 0.0, 1e-3, 0.5, 1.0, 3.0, 9.5, 40.0], dtype=torch.float64
)


def test_table_holds_the_documented_activations():
    """docs/math.md has a row for each, with its aliases in brackets after the name."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "math.md").read_text()
    rows = re.findall(r"^\| `(\w+)`(?: \(`(\w+)`\))? \|", text, re.MULTILINE)
    documented = {name: (alias,) if alias else () for name, alias in rows}
    assert documented == {name: a.aliases for name, a in ACTIVATIONS.items()}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_is_torchs_own(name):
    torch.testing.assert_close(
        ACTIVATIONS[name].value(POINTS), TORCH_ACTIVATIONS[name](POINTS), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient_is_autograds(name, dtype):
    z = POINTS.to(dtype).requires_grad_()
    da = torch.linspace(-2, 3, z.numel(), dtype=dtype)
    (expected,) = torch.autograd.grad(TORCH_ACTIVATIONS[name](z), z, da)
    gradient = ACTIVATIONS[name].gradient(z.detach(), da)
    assert gradient.dtype == dtype
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradient_treats_nan_and_infinity_as_autograd_does(name, dtype):
    """In z and in da: relu puts 0 behind an inactive unit whatever da is, all others multiply."""
    z, da = grid_of_special_values(dtype)
    z.requires_grad_()
    (expected,) = torch.autograd.grad(TORCH_ACTIVATIONS[name](z), z, da)
    found = ACTIVATIONS[name].gradient(z.detach(), da)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)
    masked = (~(z > 0) & ~z.isnan() & ~da.isfinite()).detach()
    assert masked.sum() == 15
    assert (found[masked] == 0).all() == (name == "relu")


@pytest.mark.parametrize(
    ("alias", "name"),
    [("gelu_new", "gelu_tanh"), ("swish", "silu"), ("leakyrelu", "leaky_relu"), ("gelu", "gelu")],
)
def test_canonical_name_knows_aliases(alias, name):
    assert canonical_name(alias) == name


def test_canonical_name_lists_every_known_name_for_an_unknown_one():
    with pytest.raises(ValueError, match="unknown activation 'prelu'") as caught:
        canonical_name("prelu")
    for name in (*ACTIVATIONS, "gelu_new", "swish", "leakyrelu"):
        assert name in str(caught.value)
