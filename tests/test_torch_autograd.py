"""Autograd's machinery: checkpoints, saved tensors, retained graphs, determinism."""

import functools

import pytest
import torch
from eager import eager_adapter, gradients, tensors
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import adapterkern as ak
from adapterkern.results import Needs

FORWARD = torch.ops.adapterkern.forward.default


def sandwich(function):
    """The adapter between two other operations, so that a checkpoint has something to recompute."""

    def run(**arguments):
        x = torch.sin(arguments["x"])
        return torch.cos(function(**{**arguments, "x": x}))

    return run


def test_non_reentrant_checkpoint_recomputes_and_agrees(spy):
    def run(**arguments):
        return checkpoint(lambda: sandwich(ak.bottleneck_adapter)(**arguments), use_reentrant=False)

    arguments = tensors(scaling=10)
    y, found = gradients(run, arguments)
    want_y, want = gradients(sandwich(eager_adapter), arguments)
    torch.testing.assert_close(y, want_y)
    for name in want:
        torch.testing.assert_close(found[name], want[name])
    assert spy.forwards == [True, True]
    assert len(spy.backwards) == 1


def test_reentrant_checkpoint_agrees(spy):
    arguments = tensors()
    x = arguments.pop("x").detach()

    def gradient(function):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        return leaf.grad

    def ours(x):
        return sandwich(ak.bottleneck_adapter)(x=x, **arguments)

    found = gradient(lambda x: checkpoint(ours, x, use_reentrant=True))
    want = gradient(lambda x: sandwich(eager_adapter)(x=x, **arguments))
    torch.testing.assert_close(found, want)
    assert spy.forwards == [False, True]  # under no_grad first


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "save"])
def test_selective_checkpoint_decides_over_the_op(recompiled, spy, keep, compiled):
    seen = set()

    def policy(_context, op, *_args, **_kwargs):
        seen.add(op)
        must = keep and op == FORWARD
        return CheckpointPolicy.MUST_SAVE if must else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)

    def run(**arguments):
        return checkpoint(
            lambda: sandwich(ak.bottleneck_adapter)(**arguments),
            use_reentrant=False,
            context_fn=context,
        )

    arguments = tensors()
    function = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    _, found = gradients(function, arguments)
    _, want = gradients(sandwich(eager_adapter), arguments)
    for name in want:
        torch.testing.assert_close(found[name], want[name])
    assert FORWARD in seen
    assert len(spy.forwards) == (1 if keep else 2)


def test_a_saved_tensor_changed_in_place_raises():
    for name in ("x", "down_weight", "up_weight"):
        arguments = {name: t.detach().clone() for name, t in tensors().items()}
        for trained in {"x", "down_weight"} - {name} or {"x"}:
            arguments[trained].requires_grad_()
        y = ak.bottleneck_adapter(**arguments)
        with torch.no_grad():
            arguments[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_output_and_the_residual_may_change_in_place():
    arguments = tensors(residual=True, skip=True)
    for name in ("residual", "skip"):
        arguments[name].requires_grad_(False)
    y = ak.bottleneck_adapter(**arguments)
    for name in ("residual", "skip"):
        arguments[name].zero_()
    with torch.no_grad():
        expected = y * 2
    y.mul_(2)
    assert torch.equal(y, expected)
    (found,) = torch.autograd.grad(y.sum(), arguments["up_bias"])
    torch.testing.assert_close(found, torch.full((10,), 30.0, dtype=torch.float64))


def test_a_retained_graph_gives_the_same_bits_twice():
    arguments = tensors(scaling=10)
    y = ak.bottleneck_adapter(**arguments)
    leaves = list(arguments.values())
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_gradients_accumulate():
    adapter, x = ak.BottleneckAdapter(10, 4, init="bert"), torch.randn(3, 10)
    adapter(x).square().sum().backward()
    once = [p.grad.clone() for p in adapter.parameters()]
    adapter(x).square().sum().backward()
    for parameter, gradient in zip(adapter.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_hooks_on_tensors_see_the_gradients():
    arguments = tensors()
    seen = {}
    for name, tensor in arguments.items():
        tensor.register_hook(lambda g, name=name: seen.setdefault(name, g))
    y = ak.bottleneck_adapter(**arguments)
    y.register_hook(lambda g: g * 2)
    y.sum().backward()
    expected = torch.autograd.grad(2 * eager_adapter(**arguments).sum(), list(arguments.values()))
    for name, want in zip(arguments, expected, strict=True):
        torch.testing.assert_close(seen[name], want)


def test_deterministic_mode_runs_and_changes_no_bit():
    arguments = tensors((33,), 32, 8, torch.float32, scaling=32)
    y, found = gradients(ak.bottleneck_adapter, arguments)
    torch.use_deterministic_algorithms(True)
    try:
        again_y, again = gradients(ak.bottleneck_adapter, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(y, again_y)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_anomaly_mode_names_the_operation():
    arguments = tensors()
    with torch.no_grad():
        arguments["up_weight"].fill_(float("nan"))
    with (
        pytest.warns(UserWarning, match="Error detected in _BottleneckAdapterBackward"),
        pytest.raises(RuntimeError, match="_BottleneckAdapterBackward' returned nan"),
        torch.autograd.detect_anomaly(),
    ):
        ak.bottleneck_adapter(**arguments).sum().backward()


def test_offloaded_saved_tensors_give_the_same_gradients():
    arguments = tensors()
    with torch.autograd.graph.save_on_cpu():
        _, found = gradients(ak.bottleneck_adapter, arguments)
    _, want = gradients(ak.bottleneck_adapter, arguments)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_many_gradients_at_once_are_not_given_to_a_kernel(spy):
    """A kernel would read memory that a batched tensor does not have."""
    arguments = tensors((2,))
    y, eager = ak.bottleneck_adapter(**arguments), eager_adapter(**arguments)
    rows = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    leaves = list(arguments.values())
    found = torch.autograd.grad(y, leaves, rows, is_grads_batched=True)
    expected = torch.autograd.grad(eager, leaves, rows, is_grads_batched=True)
    for gradient, want in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, want)
    assert not spy.backwards


@pytest.mark.parametrize("lazy", ["neg", "zero"])
def test_gradients_whose_memory_does_not_hold_their_values_are_prepared(spy, lazy):
    """A kernel reads memory: the dispatcher must negate or fill it before."""
    arguments, seen = tensors((2,), residual=True), []
    spy.backward = lambda call, saved, upstream, needs: (
        seen.append(upstream.y) or type(spy).backward(spy, call, saved, upstream, needs)
    )
    y = ak.bottleneck_adapter(**arguments)
    grad = torch.randn_like(y)
    given, plain = torch._neg_view(grad), -grad
    if lazy == "zero":
        given, plain = torch._efficientzerotensor(y.shape, dtype=y.dtype), torch.zeros_like(y)
    leaves = list(arguments.values())
    found = torch.autograd.grad(y, leaves, given, retain_graph=True)
    assert not seen[0].is_neg()
    assert not seen[0]._is_zerotensor()
    for gradient, want in zip(found, torch.autograd.grad(y, leaves, plain), strict=True):
        torch.testing.assert_close(gradient, want)


def test_a_residual_that_alone_needs_a_gradient_launches_nothing(spy):
    arguments = {name: t.detach() for name, t in tensors((2,), residual=True).items()}
    residual = arguments["residual"].requires_grad_()
    ak.bottleneck_adapter(**arguments).sum().backward()
    assert residual.grad.tolist() == torch.ones_like(residual).tolist()
    assert not spy.backwards


def test_a_frozen_adapter_under_a_trained_one_passes_the_gradient_on(spy):
    frozen = ak.BottleneckAdapter(10, 4, init="bert").requires_grad_(False)
    trained = ak.BottleneckAdapter(10, 4, init="bert")
    x = torch.randn(3, 10)
    frozen(trained(x)).square().sum().backward()
    above, below = spy.backwards
    assert above == Needs(x=True)
    asked = {name for name, need in below._asdict().items() if need}
    assert asked == {"down_weight", "up_weight", "down_bias", "up_bias"}
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad.abs().sum() > 0 for p in trained.parameters())
