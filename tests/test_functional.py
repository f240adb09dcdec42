"""adapterkern.bottleneck_adapter on the CPU: the operation in all its options against torch."""

import itertools

import pytest
import torch
from eager import ACTIVATIONS, eager_adapter, gradients, tensors

import adapterkern as ak
from adapterkern.parity import LAYOUTS, place

EXACT = {"rtol": 0, "atol": 0}
IN_FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
IN_FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def assert_same(arguments, grad_output=None, tolerance=IN_FLOAT64, **options):
    y, found = gradients(ak.bottleneck_adapter, arguments, grad_output, **options)
    expected_y, expected = gradients(eager_adapter, arguments, grad_output, **options)
    torch.testing.assert_close(y, expected_y, **tolerance)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **tolerance, msg=name)


@pytest.mark.parametrize("bottleneck", [1, 4, 13])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (37,), (2, 0), (2, 3, 5)], ids=str)
def test_function_takes_any_leading_shape(shape, bottleneck):
    assert_same(tensors(shape, 7, bottleneck, skip=True, scaling=7))


@pytest.mark.parametrize("bottleneck", [1, 5])
def test_function_takes_hidden_size_one(bottleneck):
    assert_same(tensors((3,), 1, bottleneck, scaling=1))


@pytest.mark.parametrize(
    ("down", "up"), list(itertools.product([True, False], repeat=2)), ids=lambda b: str(int(b))
)
def test_biases_are_independent(down, up):
    arguments = tensors()
    for name, present in (("down_bias", down), ("up_bias", up)):
        if not present:
            del arguments[name]
    assert_same(arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_function_has_every_activation(activation):
    assert_same(tensors(skip=True), activation=activation)


@pytest.mark.parametrize(
    ("alias", "name"), [("gelu_new", "gelu_tanh"), ("swish", "silu"), ("leakyrelu", "leaky_relu")]
)
def test_function_takes_aliases(alias, name):
    arguments = tensors()
    y = ak.bottleneck_adapter(**arguments, activation=alias)
    torch.testing.assert_close(y, ak.bottleneck_adapter(**arguments, activation=name), **EXACT)


@pytest.mark.parametrize("residual", ["input", None, "tensor"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 0.25, 1, 10], ids=["one", "float", "learned", "channel"])
def test_function_adds_residual_and_skip(residual, skip, scaling):
    options = {} if isinstance(scaling, int) else {"scaling": scaling}
    learned = scaling if isinstance(scaling, int) else None
    arguments = tensors(residual=residual == "tensor", skip=skip, scaling=learned)
    if residual != "tensor":
        options["residual"] = residual
    assert_same(arguments, **options)


def test_residual_that_is_x_itself_is_the_input():
    arguments = tensors()
    x = arguments["x"]
    y = ak.bottleneck_adapter(**arguments, residual=x)
    torch.testing.assert_close(y, ak.bottleneck_adapter(**arguments), **EXACT)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(eager_adapter(**arguments).sum(), x)
    torch.testing.assert_close(gradient, expected, **IN_FLOAT64)


def test_one_tensor_in_several_places_collects_all_its_gradients():
    arguments = tensors()
    x = arguments["x"]
    (gradient,) = torch.autograd.grad(ak.bottleneck_adapter(**arguments, skip=x).sum(), x)
    (expected,) = torch.autograd.grad(eager_adapter(**arguments, skip=x).sum(), x)
    torch.testing.assert_close(gradient, expected, **IN_FLOAT64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_function_takes_any_strides(layout):
    arguments = tensors((4, 6), residual=True, skip=True)
    for name in ("x", "residual", "skip"):
        arguments[name] = place(arguments[name].detach(), layout)
    grad_output = place(torch.randn(4, 6, 10, dtype=torch.float64), layout)
    y = ak.bottleneck_adapter(**arguments)
    assert y.is_contiguous()
    assert_same(arguments, grad_output)


def test_function_takes_strided_weights():
    arguments = tensors()
    for name in ("down_weight", "up_weight"):
        arguments[name] = arguments[name].detach().T.contiguous().T
    for name in ("down_bias", "up_bias"):
        arguments[name] = arguments[name].detach().repeat_interleave(2)[::2]
    assert_same(arguments)


def test_gradient_of_a_sum_is_right():
    """.sum() hands back a gradient whose strides are all 0."""
    arguments = tensors(scaling=10, skip=True)
    leaves = list(arguments.values())
    found = torch.autograd.grad(ak.bottleneck_adapter(**arguments).sum(), leaves)
    expected = torch.autograd.grad(eager_adapter(**arguments).sum(), leaves)
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want, **IN_FLOAT64)


NAMES = ("x", "down_weight", "up_weight", "down_bias", "up_bias", "residual", "skip", "scaling")


def test_every_subset_of_gradients_is_computed_and_nothing_else(spy):
    arguments = tensors((3,), residual=True, skip=True, scaling=10)
    grad_output = torch.randn(3, 10, dtype=torch.float64)
    _, everything = gradients(eager_adapter, arguments, grad_output)
    subsets = [c for n in range(1, 9) for c in itertools.combinations(NAMES, n)]
    for wanted in subsets:
        spy.backwards.clear()
        _, found = gradients(ak.bottleneck_adapter, arguments, grad_output, wanted)
        assert set(found) == set(wanted)
        for name in wanted:
            torch.testing.assert_close(found[name], everything[name], **IN_FLOAT64)
        asked = [{n for n, need in needs._asdict().items() if need} for needs in spy.backwards]
        kernels = set(wanted) - {"residual", "skip"}  # which have the gradient of y itself
        assert [names - {"residual", "skip"} for names in asked] == ([kernels] if kernels else [])
    assert len(subsets) == 255


def test_nothing_is_recorded_where_no_gradient_is_needed(spy):
    arguments = {name: t.detach() for name, t in tensors().items()}
    assert not ak.bottleneck_adapter(**arguments).requires_grad
    with torch.no_grad():
        assert not ak.bottleneck_adapter(**tensors()).requires_grad
    assert spy.forwards == [False, False]  # z was not asked for
    assert ak.bottleneck_adapter(**tensors()).requires_grad
    assert spy.forwards[-1] is True


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("half", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("x_half", [True, False], ids=["x-half", "x-fp32"])
@pytest.mark.parametrize("others_half", [True, False], ids=["others-half", "others-fp32"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
def test_dtypes_of_result_and_gradients_are_those_of_eager(half, x_half, others_half, autocast):
    arguments = tensors(dtype=torch.float32, residual=True, skip=True, scaling=10)
    for name in ("x",) if x_half else ():
        arguments[name] = arguments[name].to(half)
    for name in ("residual", "skip") if others_half else ():
        arguments[name] = arguments[name].to(half)

    def masters(**given):
        """What eager needs to take float32 parameters beside a half-precision x."""
        for name in ("down_weight", "up_weight", "down_bias", "up_bias"):
            given[name] = given[name].to(given["x"].dtype)
        return eager_adapter(**given)

    for options in (("residual", "skip", "scaling"), ("residual",), ("skip",), ("scaling",), ()):
        given = {
            name: t for name, t in arguments.items()
            if name not in ("residual", "skip", "scaling") or name in options
        }  # fmt: skip
        with torch.autocast("cpu", half, enabled=autocast):
            y, found = gradients(ak.bottleneck_adapter, given)
            expected_y, expected = gradients(eager_adapter if autocast else masters, given)
        assert y.dtype == expected_y.dtype
        tolerance = 2 * torch.finfo(half).eps * 10 if autocast or x_half else 1e-4
        torch.testing.assert_close(y, expected_y, rtol=tolerance, atol=tolerance)
        for name, gradient in found.items():
            assert gradient.dtype == expected[name].dtype == given[name].dtype
            error = (gradient.double() - expected[name].double()).norm() / expected[
                name
            ].double().norm()
            assert error < tolerance, name


def test_autocast_around_backward_changes_nothing():
    arguments = tensors(dtype=torch.float32)
    y = ak.bottleneck_adapter(**arguments).sum()
    expected = torch.autograd.grad(y, list(arguments.values()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, list(arguments.values()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_through_as_in_eager(activation):
    arguments = tensors((4,), residual=True)
    with torch.no_grad():
        arguments["x"][1, 2] = float("nan")
        arguments["x"][2, 0] = float("inf")
        arguments["residual"][3, 5] = float("nan")
    grad_output = torch.randn(4, 10, dtype=torch.float64)
    y, found = gradients(ak.bottleneck_adapter, arguments, grad_output, activation=activation)
    expected_y, expected = gradients(eager_adapter, arguments, grad_output, activation=activation)
    torch.testing.assert_close(y, expected_y, **IN_FLOAT64, equal_nan=True)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **IN_FLOAT64, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_second_run_gives_the_same_bits(dtype):
    arguments = tensors((129,), 96, 24, dtype, scaling=96)
    grad_output = torch.randn(129, 96).to(dtype)
    first, second = (gradients(ak.bottleneck_adapter, arguments, grad_output) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_token_does_not_depend_on_its_batch_in_float32():
    arguments = tensors((64,), 96, 24, torch.float32)
    whole = ak.bottleneck_adapter(**arguments)
    for rows in (slice(0, 1), slice(5, 12), slice(31, 64)):
        part = ak.bottleneck_adapter(**{**arguments, "x": arguments["x"][rows]})
        torch.testing.assert_close(part, whole[rows], **IN_FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_up_projection_gives_the_residual_bit_for_bit(dtype):
    arguments = tensors((37,), dtype=dtype, residual=True)
    with torch.no_grad():
        arguments["up_weight"].zero_()
        arguments["up_bias"].zero_()
    assert torch.equal(ak.bottleneck_adapter(**arguments), arguments["residual"])


def test_dropout_zeroes_and_rescales_the_projection():
    arguments = tensors((500,), dtype=torch.float32)
    u = ak.bottleneck_adapter(**arguments, residual=None)
    dropped = ak.bottleneck_adapter(**arguments, residual=None, dropout=0.25)
    zeroed = dropped == 0
    assert 0.2 < zeroed.float().mean() < 0.3
    torch.testing.assert_close(dropped, torch.where(zeroed, 0, u / 0.75), **IN_FLOAT32)


def test_dropout_and_its_gradient_follow_torchs_seed():
    arguments = tensors((50,))
    torch.manual_seed(3)
    y, found = gradients(ak.bottleneck_adapter, arguments, dropout=0.5)
    torch.manual_seed(3)

    def eager(**given):
        u = eager_adapter(**given, residual=None)
        return given["x"] + torch.nn.functional.dropout(u, 0.5)

    expected_y, expected = gradients(eager, arguments)
    torch.testing.assert_close(y, expected_y, **IN_FLOAT64)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **IN_FLOAT64)
