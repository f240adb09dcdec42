"""What a training step on the CPU makes torch do: as little as plain layers, counted, not timed."""

import pytest
import torch
from host_work import Operations

from adapterkern.backends import get
from adapterkern.parity import Case
from adapterkern.results import Needs, Outputs

VIEWS = {"aten." + name for name in ("view", "t", "permute")}
ALL = Needs(*[True] * 5)


def operations(call, dy):
    """Those of a forward and a backward of the reference, but for views."""
    backend = get("reference")
    with torch.no_grad(), Operations() as forward:
        outputs, saved = backend.forward(call, True)
    with torch.no_grad(), Operations() as backward:
        backend.backward(call, saved, Outputs(dy), ALL)
    kept = [[n for n in each.names if n not in VIEWS] for each in (forward, backward)]
    return outputs.y, kept


@pytest.mark.parametrize("residual", ["input", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_step_in_full_precision_is_products_sums_and_two_activations(dtype, residual):
    """No pass over [T, H] that multiplies by 1, converts, or adds what a product can start from."""
    case = Case(dtype, residual=residual, shape=(3, 11), hidden_size=16, bottleneck_size=8)
    tensors = case.draw("cpu", seed=0)
    call = case.make_call(tensors)
    y, (forward, backward) = operations(call, case.draw_grad_output(call, seed=0))
    assert forward == [f"aten.{n}" for n in ("addmm", "gelu", "new_empty", "add", "addmm_")]
    first = "addmm" if residual == "input" else "mm"
    expected = ["gelu", "mm", "clone", "sum", "mm", "gelu_backward", "mm", "sum", first]
    assert backward == [f"aten.{name}" for name in expected]
    residual = tensors["x" if residual == "input" else "residual"]
    z = torch.nn.functional.linear(tensors["x"], tensors["down_weight"], tensors["down_bias"])
    a = torch.nn.functional.gelu(z)
    u = torch.nn.functional.linear(a, tensors["up_weight"], tensors["up_bias"])
    torch.testing.assert_close(y, residual + u)


@pytest.mark.parametrize(
    ("options", "products"),
    [({}, 0), ({"scaling": 0.5}, 1), ({"scaling": "channel"}, 1)],
    ids=["unscaled", "float", "channel"],
)
def test_half_precision_converts_nothing_where_dtypes_agree(options, products):
    """Only a scaling takes an elementwise product, and 1 is none."""
    case = Case(torch.bfloat16, hidden_size=16, bottleneck_size=8, residual="none", **options)
    call = case.make_call(case.draw("cpu", seed=0))
    _, (_, backward) = operations(call, case.draw_grad_output(call, seed=0))
    assert "aten._to_copy" not in backward
    assert backward.count("aten.mul") == products
