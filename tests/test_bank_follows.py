"""What is changed on an adapter of a bank: the bank follows it, or refuses it by name."""

import pytest
import torch
from banks import bank_of, one_at_a_time, routed
from torch import nn

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def test_scaling_that_is_set_on_an_adapter_holds_from_the_next_call():
    bank, x = bank_of(), torch.randn(4, 16)
    routing = routed(bank, ["full", "narrow", "thin", None])
    bank(x, routing)
    bank["narrow"].scaling = 0.25
    y = bank(x, routing)
    torch.testing.assert_close(y, one_at_a_time(bank, x, ["full", "narrow", "thin", None]), **CLOSE)
    assert bank.scalings[:3].tolist() == [1.0, 0.25, 1.0]


def test_scaling_that_becomes_a_parameter_is_trained():
    bank, x = bank_of(), torch.randn(1, 16)
    bank["narrow"].scaling = nn.Parameter(torch.full((1,), 0.5))
    y = bank(x, routed(bank, ["narrow"]))
    torch.testing.assert_close(y, bank["narrow"](x), **CLOSE)
    (found,) = torch.autograd.grad(y.sum(), bank["narrow"].scaling)
    (wanted,) = torch.autograd.grad(bank["narrow"](x).sum(), bank["narrow"].scaling)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_learned_scaling_that_is_replaced_is_followed():
    bank, x = bank_of(options={"scaling": "learned"}), torch.randn(1, 16)
    routing = routed(bank, ["narrow"])
    bank(x, routing)
    bank["narrow"].scaling = nn.Parameter(torch.full((1,), 5.0))
    torch.testing.assert_close(bank(x, routing), bank["narrow"](x), **CLOSE)


def test_learned_scaling_that_becomes_a_number_is_followed():
    bank, x = bank_of(options={"scaling": "learned"}), torch.randn(1, 16)
    routing, adapter = routed(bank, ["narrow"]), bank["narrow"]
    bank(x, routing)
    del adapter.scaling
    adapter.scaling = 1.0
    torch.testing.assert_close(bank(x, routing), adapter(x), **CLOSE)


def test_parametrized_weight_is_used_and_trained():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    bank, x = bank_of(), torch.randn(1, 16)
    routing = routed(bank, ["narrow"])
    bank(x, routing)
    with torch.no_grad():
        expected = x + (bank["narrow"](x) - x)
    nn.utils.parametrize.register_parametrization(bank["narrow"].up_proj, "weight", Halved())
    for _ in range(2):
        y = bank(x, routing)
        torch.testing.assert_close(y, bank["narrow"](x), **CLOSE)
    assert not torch.allclose(y, expected)
    y.sum().backward()
    assert bank["narrow"].up_proj.parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("replace", ["parameter", "data"])
def test_weight_that_is_put_elsewhere_is_used_all_the_same(replace):
    bank, x = bank_of(), torch.randn(2, 16)
    routing = routed(bank, ["narrow", "full"])
    bank(x, routing)
    projection, other = bank["narrow"].up_proj, torch.randn(16, 5)
    if replace == "parameter":
        projection.weight = nn.Parameter(other)
    else:
        projection.weight.data = other
    y = bank(x, routing)
    torch.testing.assert_close(y, one_at_a_time(bank, x, ["narrow", "full"]), **CLOSE)
    y.sum().backward()
    assert projection.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(bank(x, routing), y, **CLOSE)


def test_projection_that_is_wrapped_is_refused_with_its_cure():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight, self.bias = inner.weight, inner.bias

    bank, x = bank_of(), torch.randn(1, 16)
    routing = routed(bank, ["narrow"])
    bank(x, routing)
    bank["narrow"].up_proj = Wrapped(bank["narrow"].up_proj)
    with pytest.raises(ValueError, match="must stay plain linear layers") as caught:
        bank(x, routing)
    assert str(caught.value) == (
        "the projections of adapter 'narrow' must stay plain linear layers, got Projection and "
        "Wrapped.\n  hint: a bank reads weights and calls no projection; run such an adapter alone."
    )


@pytest.mark.parametrize(("option", "value"), [("dropout", 0.1), ("activation", "relu")])
def test_option_that_a_bank_cannot_follow_is_refused(option, value):
    bank = bank_of()
    setattr(bank["narrow"], option, value)
    activation, dropout = ("gelu", value) if option == "dropout" else (value, 0.0)
    with pytest.raises(ValueError, match="must keep") as caught:
        bank(torch.randn(1, 16), routed(bank, ["narrow"]))
    assert str(caught.value) == (
        "adapter 'narrow' must keep the bank's activation, gelu, and a dropout of 0, got "
        f"{activation} and {dropout}."
    )


def narrower(adapter):
    adapter.down_proj, adapter.up_proj = nn.Linear(16, 4), nn.Linear(4, 16)


def wider(adapter):
    adapter.up_proj.weight = nn.Parameter(torch.randn(16, 6))


def without_bias(adapter):
    adapter.up_proj.bias = None


def of_channels(adapter):
    adapter.scaling = nn.Parameter(torch.ones(16))


UNFOLLOWED = {
    narrower: "keep its 5 units, got weights of [4, 16] and [16, 4].\n  hint: "
    "remove it, and add one of that size.",
    wider: "keep its 5 units, got weights of [5, 16] and [16, 6].\n  hint: "
    "remove it, and add one of that size.",
    without_bias: "keep its biases, and one is None.\n  hint: torch.nn.init.zeros_ makes a bias "
    "that adds nothing.",
    of_channels: "keep a scaling that is a float or of shape [1], got [16].\n  hint: multiply "
    "up_proj.weight's rows and up_proj.bias by it, which computes the same.",
}


@pytest.mark.parametrize(("change", "message"), UNFOLLOWED.items())
def test_shape_that_a_bank_cannot_follow_is_refused(change, message):
    bank, x = bank_of(), torch.randn(1, 16)
    routing = routed(bank, ["narrow"])
    bank(x, routing)
    change(bank["narrow"])
    with pytest.raises(ValueError, match="must keep") as caught:
        bank(x, routing)
    assert str(caught.value) == f"adapter 'narrow' must {message}"
