"""functorch, forward mode, double backward: right, or a clear error; never wrong."""

import pytest
import torch
from eager import eager_adapter, tensors
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import adapterkern as ak
from adapterkern import ops

H, R = 6, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def given(spy):
    """Weights and x in float64; a kernel backend stands before the reference."""
    return [t.detach() for t in tensors((3,), H, R, bias=False).values()]


def with_options(function):
    bias = torch.linspace(-1, 1, R, dtype=torch.float64)

    def adapter(x, down_weight, up_weight):
        return function(x, down_weight, up_weight, bias, scaling=0.5)

    return adapter


def squares(function):
    return lambda *a: function(*a).square().sum()


def ones_like(arguments):
    return tuple(torch.ones_like(t) for t in arguments)


def dual_tangent(function):
    def run(*a):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, one) for t, one in zip(a, ones_like(a), strict=True)]
            return forward_ad.unpack_dual(function(*duals)).tangent

    return run


def expanded_vmap(function):
    return lambda x, down, up: vmap(function)(x, down.expand(3, R, H), up.expand(3, H, R))


TRANSFORMS = {
    "grad": lambda f: grad(squares(f), argnums=(0, 1, 2)),
    "grad-of-grad": lambda f: grad(lambda *a: grad(squares(f), 1)(*a).square().sum()),
    "vjp": lambda f: lambda *a: vjp(f, *a)[1](torch.ones_like(a[0])),
    "jvp": lambda f: lambda *a: jvp(f, a, ones_like(a)),
    "jacrev": lambda f: jacrev(f, argnums=(0, 1)),
    "jacfwd": lambda f: jacfwd(f, argnums=(0, 2)),
    "hessian": lambda f: hessian(squares(f)),
    "vmap": lambda f: vmap(f, in_dims=(0, None, None)),
    "vmap-of-weights": expanded_vmap,
    "per-sample-grad": lambda f: (
        lambda x, down, up: vmap(grad(lambda w, row: squares(f)(row, w, up)), in_dims=(None, 0))(
            down, x
        )
    ),
    "forward-ad": dual_tangent,
}


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def assert_all_close(found, expected):
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        assert b.abs().sum() > 0


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform_of_the_adapter_is_that_of_eager(spy, given, transform):
    ours = transform(with_options(ak.bottleneck_adapter))(*given)
    assert_all_close(ours, transform(with_options(eager_adapter))(*given))
    assert not spy.forwards


@pytest.mark.sweep
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_compiled_transform_of_the_adapter_is_that_of_eager(recompiled, given, transform):
    """There, an autograd.Function under functorch would give wrong gradients in silence."""
    compiled = torch.compile(transform(with_options(ak.bottleneck_adapter)), backend="aot_eager")
    assert_all_close(compiled(*given), transform(with_options(eager_adapter))(*given))


REFUSED_AROUND_COMPILE = ("grad", "vmap", "jvp", "jacrev")


def right_or_refused(call, expected, refusal):
    try:
        found = call()
    except RuntimeError as error:
        if refusal not in str(error):
            raise
    else:
        assert_all_close(found, expected)


@pytest.mark.parametrize(
    "transform", [TRANSFORMS[name] for name in REFUSED_AROUND_COMPILE], ids=REFUSED_AROUND_COMPILE
)
def test_transform_of_a_compiled_adapter_is_right_or_raises(recompiled, given, transform):
    """torch.compile refuses such calls; should it ever accept them, they have to be right."""
    compiled = torch.compile(with_options(ak.bottleneck_adapter), backend="aot_eager")
    expected = transform(with_options(eager_adapter))(*given)
    right_or_refused(lambda: transform(compiled)(*given), expected, "from user code")


@pytest.mark.parametrize("before", [False, True], ids=["first-call", "compiled-before"])
def test_forward_mode_through_a_compiled_adapter_is_right_or_raises(recompiled, given, before):
    """Torch refuses tangents in compiled code from 2.14 on."""
    compiled = torch.compile(
        with_options(ak.bottleneck_adapter), backend="aot_eager", fullgraph=True
    )
    if before:
        compiled(*given)
    expected = dual_tangent(with_options(eager_adapter))(*given)
    refusal = "input tensors that carry a forward-mode AD tangent"
    right_or_refused(lambda: dual_tangent(compiled)(*given), expected, refusal)


def test_forward_mode_through_a_compiled_training_graph_is_right_or_raises(recompiled, given):
    """From 2.14 on torch runs such a call without its graph."""
    leaves = [t.requires_grad_() for t in given]
    compiled = torch.compile(with_options(ak.bottleneck_adapter), backend="aot_eager")
    compiled(*leaves)
    expected = dual_tangent(with_options(eager_adapter))(*leaves)
    right_or_refused(lambda: dual_tangent(compiled)(*leaves), expected, "forward mode AD")


def second_derivatives(function, arguments):
    leaves = [t.detach().requires_grad_() for t in arguments]
    first = torch.autograd.grad(squares(function)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def test_double_backward_is_that_of_eager(given):
    found = second_derivatives(with_options(ak.bottleneck_adapter), given)
    assert_all_close(found, second_derivatives(with_options(eager_adapter), given))


@pytest.mark.parametrize("options", [{}, {"residual": True, "skip": True, "scaling": H}], ids=str)
def test_double_backward_covers_every_input(spy, options):
    arguments = tensors((3,), H, R, **options)

    def of(function):
        return lambda *a: function(**dict(zip(arguments, a, strict=True)))

    found = second_derivatives(of(ak.bottleneck_adapter), arguments.values())
    assert_all_close(found, second_derivatives(of(eager_adapter), arguments.values()))
    assert spy.forwards == [True]
    assert len(spy.backwards) == 1  # of the last pass, which is not differentiated again


def test_double_backward_says_once_that_the_reference_runs(given, caplog):
    ops.log_plain_backward.cache_clear()
    for _ in range(2):
        second_derivatives(with_options(ak.bottleneck_adapter), given)
    assert len(caplog.records) == 1
    assert "create_graph=True asks for a differentiable gradient" in caplog.text


def test_double_backward_of_mixed_dtypes_keeps_them(spy):
    arguments = tensors((3,), H, R, torch.bfloat16, residual=True, scaling=H)
    for name in ("residual", "scaling"):
        arguments[name] = arguments[name].detach().float().requires_grad_()
    y = ak.bottleneck_adapter(**arguments)
    leaves = list(arguments.values())
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(eager_adapter(**arguments).square().sum(), leaves)
    for leaf, gradient, want in zip(leaves, first, expected, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient, want, rtol=0.1, atol=0.1)


def test_gradients_of_inputs_that_depend_on_each_other_are_not_counted_twice(given):
    """A weight made from x (a hypernetwork): its gradient reaches x once, through the weight."""
    x, _, up = given

    def first_and_second(function):
        leaf = x.detach().requires_grad_()
        down = torch.tanh(leaf[:, :R].T @ leaf)
        (first,) = torch.autograd.grad(
            squares(with_options(function))(leaf, down, up), leaf, create_graph=True
        )
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return first, second

    assert_all_close(first_and_second(ak.bottleneck_adapter), first_and_second(eager_adapter))


def test_gradients_may_be_asked_for_in_batches(given):
    leaves = [t.requires_grad_() for t in given]
    grads = torch.randn(5, 3, H, dtype=torch.float64)

    def batched(function):
        y = with_options(function)(*leaves)
        return torch.autograd.grad(y, leaves, grads, is_grads_batched=True)

    assert_all_close(batched(ak.bottleneck_adapter), batched(eager_adapter))

    def vmapped(function):
        y = with_options(function)(*leaves)
        return vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(grads)

    assert_all_close(vmapped(ak.bottleneck_adapter), vmapped(eager_adapter))


@pytest.mark.parametrize("vectorize", [False, True])
def test_autograd_functional_jacobian_is_right(given, vectorize):
    def jacobian(function):
        f = with_options(function)
        return torch.autograd.functional.jacobian(f, tuple(given), vectorize=vectorize)

    assert_all_close(jacobian(ak.bottleneck_adapter), jacobian(eager_adapter))


def test_module_under_functional_call_gives_per_sample_gradients(spy):
    adapter = ak.BottleneckAdapter(H, R, init="bert", dtype=torch.float64)
    parameters = {name: p.detach() for name, p in adapter.named_parameters()}
    x = torch.randn(5, H, dtype=torch.float64)

    def loss(parameters, row):
        return functional_call(adapter, parameters, row).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, row in enumerate(x):
        adapter.zero_grad()
        adapter(row).square().sum().backward()
        for name, parameter in adapter.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad, **CLOSE)


def test_compiled_double_backward_raises(recompiled, given):
    compiled = torch.compile(with_options(ak.bottleneck_adapter), backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second_derivatives(compiled, given)
