"""What a call keeps for its backward: no more than the gradients asked for need."""

import functools
import itertools

import pytest
import torch
from eager import eager_adapter, tensors
from host_work import Operations
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import adapterkern as ak

TOKENS, H, R = 7, 5, 3
SHAPES = {
    "x": (TOKENS, H),
    "down_weight": (R, H),
    "up_weight": (H, R),
    "down_bias": (R,),
    "up_bias": (H,),
    "scaling": (H,),
    "z": (TOKENS, R),
}
# The values that each gradient needs, by the equations of docs/math.md.
READ = {
    "x": {"down_weight", "up_weight", "scaling", "z"},
    "down_weight": {"x", "up_weight", "scaling", "z"},
    "down_bias": {"up_weight", "scaling", "z"},
    "up_weight": {"scaling", "z"},
    "up_bias": {"scaling"},
    "scaling": {"up_weight", "up_bias", "z"},
    "residual": set(),
    "skip": set(),
}
NAMES = [name for name in SHAPES if name != "z"]
SUBSETS = [c for size in range(1, 7) for c in itertools.combinations(NAMES, size)]
ALONE = [(name,) for name in READ]


def problem(trained, **options):
    """Tensors of one call of which those trained ask for a gradient."""
    options = {"residual": True, "skip": True, "scaling": H} | options
    given = tensors((TOKENS,), H, R, **options)
    return {name: t.detach().requires_grad_(name in trained) for name, t in given.items()}


def kept(function, arguments):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(**arguments)
    return y, saved


def grads(y, arguments, trained):
    leaves = [arguments[name] for name in trained]
    return torch.autograd.grad(y, leaves, torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype))


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("learned", [True, False], ids=["learned-scaling", "float-scaling"])
@pytest.mark.parametrize("backend", ["spy", "reference"])
def test_every_frozen_subset_keeps_what_its_gradients_need_and_no_more(spy, backend, learned):
    run = functools.partial(
        ak.bottleneck_adapter, backend="triton" if backend == "spy" else backend
    )
    for trained in [*SUBSETS, *ALONE]:
        if not learned and "scaling" in trained:
            continue
        arguments = problem(trained, scaling=H if learned else None)
        y, saved = kept(run, arguments)
        read = set().union(*(READ[name] for name in trained)) - (set() if learned else {"scaling"})
        expected = [SHAPES[name] for name in SHAPES if name in read]
        assert sorted(tuple(t.shape) for t in saved) == sorted(expected), trained
        addresses = {t.data_ptr() for t in arguments.values()}
        assert sum(t.data_ptr() not in addresses for t in saved) == ("z" in read)  # no copies
        plain, layers = kept(eager_adapter, arguments)
        of_x = [sum(t.data_ptr() == arguments["x"].data_ptr() for t in s) for s in (saved, layers)]
        assert of_x[0] == of_x[1], trained
        assert_close(grads(y, arguments, trained), grads(plain, arguments, trained))


def test_a_frozen_adapter_of_a_model_keeps_neither_x_nor_its_biases():
    adapter = ak.BottleneckAdapter(16, 4, init="bert").requires_grad_(False)
    x = torch.randn(3, 7, 16, requires_grad=True)
    _, saved = kept(lambda x: adapter(x * 1), {"x": x})
    assert sorted(tuple(t.shape) for t in saved) == [(4, 16), (16, 4), (21, 4)]


def outcome(function, trained, changed, **options):
    arguments = problem(trained, **options)
    arguments = {name: t if t.requires_grad else t.clone() for name, t in arguments.items()}
    leaf = arguments["x"]
    if "x" in trained:
        arguments["x"] = leaf * 1
    y = function(**arguments)
    with torch.no_grad():
        arguments[changed].add_(1)
    try:
        return grads(y, arguments | {"x": leaf}, trained)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


@pytest.mark.parametrize("trained", ALONE, ids="".join)
def test_changes_in_place_run_or_raise_as_with_plain_layers(spy, trained):
    """But for d(scaling), which plain layers take from u [T, H], kept beside all else."""
    for changed in SHAPES.keys() - {"z"}:
        ours, plain = (outcome(f, trained, changed) for f in (ak.bottleneck_adapter, eager_adapter))
        if trained == ("scaling",) and changed in ("up_weight", "up_bias"):
            assert (ours, plain is not None) == (None, True)
            continue
        assert (ours is None) == (plain is None), changed
        if plain is not None:
            assert_close(ours, plain)


@pytest.mark.parametrize("trained", ALONE, ids="".join)
def test_inference_tensors_are_taken_where_plain_layers_take_them(spy, trained):
    def run(function, name):
        arguments = problem(trained)
        with torch.inference_mode():
            arguments[name] = arguments[name].detach().clone()
        try:
            return grads(function(**arguments), arguments, trained)
        except RuntimeError as error:
            if "Inference tensors cannot be saved for backward" not in str(error):
                raise
            return None

    for name in READ.keys() - set(trained):
        ours, plain = run(ak.bottleneck_adapter, name), run(eager_adapter, name)
        assert (ours is None) == (plain is None), name
        if plain is not None:
            assert_close(ours, plain)


@pytest.mark.parametrize("trained", ALONE, ids="".join)
def test_the_op_takes_outlines_where_operations_are_watched(spy, trained):
    arguments = problem(trained)
    with Operations() as seen:
        found = grads(ak.bottleneck_adapter(**arguments), arguments, trained)
    assert ("adapterkern.backward" in seen.names) == (trained[0] not in ("residual", "skip"))
    assert_close(found, grads(eager_adapter(**arguments), arguments, trained))


@pytest.mark.sweep
@pytest.mark.parametrize("trained", ALONE, ids="".join)
def test_a_compiled_call_keeps_no_more_and_agrees(recompiled, spy, trained):
    arguments = problem(trained)
    compiled = torch.compile(ak.bottleneck_adapter, backend="aot_eager", fullgraph=True)
    y, saved = kept(compiled, arguments)
    shapes = {tuple(t.shape) for t in saved if t.numel() > 0}
    assert shapes <= {SHAPES[name] for name in READ[trained[0]]}
    assert_close(
        grads(y, arguments, trained), grads(eager_adapter(**arguments), arguments, trained)
    )


@pytest.mark.thorough
@pytest.mark.parametrize("trained", [("x",), ("up_bias",), ("scaling", "down_bias")], ids="+".join)
def test_compiled_autograd_and_dynamic_shapes_know_outlines(recompiled, spy, trained):
    for tokens in (TOKENS, TOKENS + 2):
        given = tensors((tokens,), H, R, scaling=H)
        arguments = {n: t.detach().requires_grad_(n in trained) for n, t in given.items()}
        expected = grads(eager_adapter(**arguments), arguments, trained)
        y = ak.bottleneck_adapter(**arguments)
        weights = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)
        loss = (y * weights).sum()
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda loss=loss: loss.backward(), backend="aot_eager")()
        assert_close([arguments[name].grad for name in trained], expected)
        dynamic = torch.compile(ak.bottleneck_adapter, backend="aot_eager", dynamic=True)
        assert_close(grads(dynamic(**arguments), arguments, trained), expected)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize("trained", ALONE, ids="".join)
def test_selective_checkpoints_of_frozen_subsets_agree(spy, trained, keep):
    def policy(_context, op, *_args, **_kwargs):
        must = keep and op == torch.ops.adapterkern.forward.default
        return CheckpointPolicy.MUST_SAVE if must else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)

    def run(function, arguments):
        return torch.cos(function(**arguments))

    arguments = problem(trained)
    y = checkpoint(run, ak.bottleneck_adapter, arguments, use_reentrant=False, context_fn=context)
    expected = grads(run(eager_adapter, arguments), arguments, trained)
    assert_close(grads(y, arguments, trained), expected)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_second_derivatives_of_every_frozen_subset_are_those_of_eager(spy, activation):
    """Through z, not through values of x: those are not there."""
    for trained in SUBSETS:
        arguments = problem(trained)

        def derivatives(function, arguments=arguments, trained=trained):
            leaves = [arguments[name] for name in trained]
            y = function(**arguments, activation=activation)
            first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

        assert_close(derivatives(ak.bottleneck_adapter), derivatives(eager_adapter))


def test_third_derivatives_are_those_of_eager(spy):
    def third(function):
        arguments = problem(("x", "down_weight"))
        leaf = arguments["x"]
        found = function(**arguments).pow(3).sum()
        for _ in range(3):
            (found,) = torch.autograd.grad(found.sum(), leaf, create_graph=True)
        return [found]

    assert_close(third(ak.bottleneck_adapter), third(eager_adapter))


@pytest.mark.parametrize("trained", ALONE, ids="".join)
def test_gradients_of_frozen_subsets_in_batches(spy, trained):
    arguments = problem(trained)
    rows = torch.eye(TOKENS * H, dtype=torch.float64).view(-1, TOKENS, H)

    def batched(function):
        y = function(**arguments)
        return torch.autograd.grad(y, arguments[trained[0]], rows, is_grads_batched=True)

    assert_close(batched(ak.bottleneck_adapter), batched(eager_adapter))
    assert not spy.backwards
