"""adapterkern.reference: the hand-written backward against autograd and finite differences."""

import itertools

import pytest
import torch
from eager import ACTIVATIONS, eager_adapter, gradients, tensors

import adapterkern as ak
from adapterkern import reference
from adapterkern.parity import Case, check_case
from adapterkern.results import Needs, Outputs, Saved
from adapterkern.spec import TENSOR_NAMES, make_call
from adapterkern.testing import nan_filled_memory

OPTIONS = {
    "plain": {"bias": False},
    "biases": {},
    "residual-skip": {"residual": True, "skip": True},
    "learned-scaling": {"scaling": 1},
    "channel-scaling": {"scaling": 10, "residual": True},
}
IN_FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def names(arguments):
    return [name for name in TENSOR_NAMES if name in arguments]


def make(arguments, **options):
    settings = {"residual": "input", "skip": None, "activation": "gelu", "scaling": 1.0}
    settings |= {"down_bias": None, "up_bias": None, "dropout": 0.0}
    return make_call(**settings | arguments | options)


def hand_written(arguments, grad_output, needs, **options):
    call = make({name: t.detach() for name, t in arguments.items()}, **options)
    _, saved = reference.forward(call)
    saved = Saved(saved.z.reshape(-1, call.bottleneck_size))
    asked = Needs(**dict.fromkeys(needs, True))
    found = reference.backward(call, saved, Outputs(grad_output), asked)
    return {name: g for name, g in found._asdict().items() if g is not None}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_is_autograd_of_plain_modules(activation, options):
    arguments = tensors(**options)
    grad_output = torch.randn(3, 5, 10, dtype=torch.float64)
    y, expected = gradients(eager_adapter, arguments, grad_output, activation=activation)
    call = make(arguments, activation=activation)
    torch.testing.assert_close(reference.forward(call)[0].y, y, **IN_FLOAT64)
    found = hand_written(arguments, grad_output, names(arguments), activation=activation)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **IN_FLOAT64, msg=name)
    assert list(found) == names(arguments)


def test_a_call_is_computed_in_its_own_dtype_whatever_autocast_says():
    call = make({name: t.detach().float() for name, t in tensors().items()})
    dy = torch.randn(3, 5, 10)

    def results():
        (y, _), (z, *_) = reference.forward(call)
        saved, needs = Saved(z.reshape(-1, z.shape[-1])), Needs(True, True, True, True, True)
        gradients = reference.backward(call, saved, Outputs(dy), needs)
        return y, z, *(g for g in gradients if g is not None)

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):  # not so where the call was made
        found = results()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("residual", [None, "input"])
@pytest.mark.parametrize("scaling", [0.3, -2.0, 0.0])
def test_backward_handles_float_scaling(scaling, residual):
    arguments = tensors()
    grad_output = torch.randn(3, 5, 10, dtype=torch.float64)
    options = {"scaling": scaling, "residual": residual}
    _, expected = gradients(eager_adapter, arguments, grad_output, **options)
    for name, gradient in hand_written(arguments, grad_output, names(arguments), **options).items():
        torch.testing.assert_close(gradient, expected[name], **IN_FLOAT64, msg=name)


def test_backward_computes_exactly_what_is_needed():
    arguments = tensors(scaling=10)
    grad_output = torch.randn(3, 5, 10, dtype=torch.float64)
    everything = hand_written(arguments, grad_output, names(arguments))
    for size in range(1, 6):
        for needs in itertools.combinations(names(arguments), size):
            some = hand_written(arguments, grad_output, needs)
            assert tuple(some) == needs
            assert all(torch.equal(some[name], everything[name]) for name in needs)


@pytest.mark.sweep("options", "activation")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_function_passes_gradcheck_and_gradgradcheck(activation, options):
    """First derivatives by the hand-written backward, second ones by autograd's."""
    arguments = tensors(
        (3,), 5, 3, **options | ({"scaling": 5} if options.get("scaling") == 10 else {})
    )

    def function(*values):
        return ak.bottleneck_adapter(
            **dict(zip(arguments, values, strict=True)), activation=activation
        )

    assert torch.autograd.gradcheck(function, tuple(arguments.values()), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tuple(arguments.values()))


def test_backward_of_half_precision_stays_in_range():
    """z^3 overflows float16 where gelu_tanh's derivative is simply 1."""
    arguments = tensors((4,), dtype=torch.float16)
    arguments["down_bias"] = torch.full((4,), 60.0, dtype=torch.float16)
    found = hand_written(
        arguments, torch.ones(4, 10, dtype=torch.float16), ["x"], activation="gelu_tanh"
    )
    weights = arguments["up_weight"].double().sum(0) @ arguments["down_weight"].double()
    torch.testing.assert_close(found["x"].double(), 1 + weights.expand(4, 10), rtol=3e-3, atol=3e-3)


def half_call(dtype, dy, **options):
    """A call in half precision beside a float32 residual, and its gradients from a float32 dy."""
    sizes = {"x": (len(dy), 1), "down_weight": (1, 1), "up_weight": (1, 1), "up_bias": (1,)}
    arguments = {name: torch.ones(size, dtype=dtype) for name, size in sizes.items()}
    arguments |= {name: arguments[name].float() for name in ("up_weight", "up_bias")}
    call = make(arguments, residual=torch.zeros(len(dy), 1), activation="identity", **options)
    _, saved = reference.forward(call)
    needs = Needs(True, True, True, up_bias=True, scaling=call.scaling is not None)
    return reference.backward(call, saved, Outputs(torch.tensor(dy)[:, None]), needs)


def test_du_is_rounded_to_the_products_dtype_before_it_is_summed():
    """As eager, which stores it: 1 + 2^-9 is 1 in bfloat16."""
    assert half_call(torch.bfloat16, [1 + 2**-9] * 2).up_bias.item() == 2.0


def test_dy_is_scaled_before_it_is_rounded():
    """1e5 is beyond float16, a hundredth of it is not."""
    found = half_call(torch.float16, [1e5], scaling=0.01)
    for gradient in (found.x, found.down_weight, found.up_weight, found.up_bias):
        torch.testing.assert_close(gradient.flatten().float(), torch.tensor([1000.0]))


def test_the_gradient_of_the_scaling_is_computed_in_float32():
    """dy is not rounded to the products' dtype, nor its product with u = 1 + 1, nor their sum."""
    found = half_call(torch.bfloat16, [1 + 2**-12, 256.0, 1.0], scaling=torch.ones(1))
    assert found.scaling.item() == 2 * (258 + 2**-12)


# Beyond the grid of the parity rule: many tokens, and sizes without a common factor.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "hidden", "bottleneck"),
    [((4097,), 48, 3), ((2, 3, 7), 129, 65), ((5,), 1, 1), ((1,), 7, 13)],
)
def test_reference_matches_float64_at_odd_sizes(dtype, shape, hidden, bottleneck):
    case = Case(
        dtype,
        shape=shape,
        hidden_size=hidden,
        bottleneck_size=bottleneck,
        scaling="channel",
        skip=True,
    )
    with nan_filled_memory():
        rows = check_case(case, "reference")
    assert not [str(row) for row in rows if not row.passed]
