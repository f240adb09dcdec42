"""Parallel and BatchSplit as one call of the op of many adapters: what runs it, and that it is the
library's loop in output and gradients."""

import contextlib
import copy
import functools
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
import adapterhub_oracle as oracle
import adapters.composition as ac
from adapterhub_models import bert, run
from adapters.methods.bottleneck import BottleneckLayer
from test_adapterhub_oracle import ON_EVERY_DEVICE, calls_of, placed

import adapterkern as ak
from adapterkern.backends.base import GROUPED_FEATURES
from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import fast_path, mixed
from adapterkern.integrations.adapterhub.reasons import GROUP_REASONS, SAME_LAUNCH

SMALL = "seq_bn[reduction_factor=4]"
CONFIGS = {
    "a": SMALL,
    "b": "seq_bn[reduction_factor=8]",
    "c": SMALL,
    "d": "seq_bn[reduction_factor=3,scaling=0.5]",
    "e": "seq_bn[reduction_factor=4,leave_out=[1]]",
    "h": "double_seq_bn[reduction_factor=4]",
    "i": "double_seq_bn[reduction_factor=2,leave_out=[0]]",
    "l": "seq_bn[reduction_factor=5,scaling='learned']",
    "p": "par_bn[reduction_factor=4]",
    "q": "scaled_par_bn[reduction_factor=3]",
    "r": "par_bn[leave_out=[1]]",
}
SETUPS = {
    "parallel": ac.Parallel("a", "b"),
    "parallel_of_one_size": ac.Parallel("a", "c"),
    "parallel_of_four": ac.Parallel("a", "b", "c", "d"),
    "parallel_learned": ac.Parallel("l", "d", "a"),
    "batch_split_of_four": ac.BatchSplit("a", "b", "c", "d", batch_sizes=1),
    "batch_split_empty": ac.BatchSplit("a", "b", "c", batch_sizes=[1, 0, 3]),
    "batch_split_of_parallel_adapters": ac.BatchSplit("p", "q", batch_sizes=[3, 1]),
    "stack_parallel": ac.Stack("d", ac.Parallel("a", "b")),
    # Alone, the library itself fails where a child has no adapter in a layer.
    "stack_parallel_with_a_gap": ac.Stack("d", ac.Parallel("a", "e", "b")),
    "stack_parallel_with_a_gap_at_its_end": ac.Stack("d", ac.Parallel("a", "b", "e")),
    "stack_batch_split_with_a_gap": ac.Stack("d", ac.BatchSplit("a", "e", batch_sizes=2)),
    "stack_of_one_norm_with_a_gap": ac.Stack(
        "h", ac.BatchSplit("h", "i", "h", batch_sizes=[1, 2, 1])
    ),
    "stack_of_parallel_adapters_with_a_gap": ac.Stack(
        "p", ac.BatchSplit("p", "r", "q", batch_sizes=[1, 2, 1])
    ),
}
IN_HALF = (
    "parallel_of_four",
    "batch_split_empty",
    "stack_parallel_with_a_gap",
    "stack_of_one_norm_with_a_gap",
)


@contextlib.contextmanager
def one_launch():
    """Where no kernel has the op of many adapters, the reference that is named has it."""
    with contextlib.nullcontext() if mixed.is_served("cpu") else ak.use_backend("reference"):
        yield


@pytest.fixture
def launches(monkeypatch):
    """Every call of the op of many adapters."""
    calls, run_op = [], mixed.ops.run

    def counting(call, *rest):
        calls.append(call)
        return run_op(call, *rest)

    monkeypatch.setattr(mixed.ops, "run", counting)
    return calls


@functools.cache
def model_of(name: str, mode: str, device: str):
    model = models.build(name)
    for adapter, config in CONFIGS.items():
        model.add_adapter(adapter, config=config)
    models.randomise_adapters(model)
    return placed(model, mode, device)


def with_setup(name: str, mode: str, device: str, setup):
    model = model_of(name, mode, device)
    model.set_active_adapters(setup)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


@pytest.mark.sweep("device", "setup", lambda p: (p["name"], p["mode"]))
@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    ("name", "mode", "setup"),
    [
        pytest.param(name, mode, setup, id=f"{name}-{mode}-{setup}")
        for name in ("bert", "gpt2")
        for mode in ("float32", "autocast", "bfloat16")
        for setup in (SETUPS if mode == "float32" else IN_HALF)
        if mode == "float32" or name == "bert"
    ],
)
def test_one_launch_for_all_agrees_with_stock(name, mode, setup, device, launches, counted):
    model = with_setup(name, mode, device, SETUPS[setup])
    calls = calls_of(model, name, mode)
    with one_launch():
        oracle.compare(model, calls)
    ran = 2 * len(calls)  # with a gradient and without
    alone = setup == "stack_batch_split_with_a_gap"  # "a" is, in the layer that has no "e"
    assert len(launches) == ran - 2 * alone
    assert len(counted) == ("stack" in setup) * ran + 2 * alone


def rolled(call):
    return call._replace(down_weights=call.down_weights.roll(1, 0))


def without_ranks(call):
    down, up = call.down_weights.clone(), call.up_weights.clone()
    beyond = torch.arange(call.bottleneck_size) >= call.ranks[:, None]
    for weight in (down, up.mT):  # of units that are not there
        weight[beyond] += torch.randn_like(weight[beyond])
    return call._replace(down_weights=down, up_weights=up, ranks=None)


def of_other_rows(call):
    return call._replace(x=call.x.flip(0), residual=None, add_input=True)


@pytest.mark.parametrize("wrong", [rolled, without_ranks, of_other_rows])
def test_the_oracle_fails_a_launch_that_is_wrong(wrong, monkeypatch):
    model = with_setup("bert", "float32", "cpu", SETUPS["parallel"])
    calls, run_op = calls_of(model, "bert", "float32"), mixed.ops.run
    monkeypatch.setattr(mixed.ops, "run", lambda call, *rest: run_op(wrong(call), *rest))
    with one_launch(), pytest.raises(oracle.OracleError, match="is off by"):
        oracle.compare(model, calls)


def test_the_oracle_fails_gradients_of_another_child(monkeypatch):
    model = with_setup("bert", "float32", "cpu", SETUPS["parallel_of_one_size"])
    calls, run_op = calls_of(model, "bert", "float32"), mixed.ops.run

    def swapped(call, backend, leaves):
        slots = tuple(1 - slot for slot in leaves.slots)
        return run_op(call, backend, leaves._replace(slots=slots))

    monkeypatch.setattr(mixed.ops, "run", swapped)
    with one_launch(), pytest.raises(oracle.OracleError, match="adapters"):
        oracle.compare(model, calls)


@pytest.mark.parametrize("setup", ["parallel_of_four", "batch_split_of_four"])
def test_a_whole_model_gives_the_library_s_bits(setup, launches):
    """Also the rows that Parallel repeats, and for which layer it does."""
    model = with_setup("bert", "float32", "cpu", SETUPS[setup])
    expected = run(model)
    with ak.use_backend("reference"), adapterhub.patched(model, strict=True):
        found = run(model)
    assert len(launches) == 2
    assert torch.equal(found, expected)


def test_training_moves_what_the_library_moves(launches):
    """The adapters that the setup does not name get no gradient, those it names the library's."""
    stock = copy.deepcopy(model_of("gpt2", "float32", "cpu"))
    ours = copy.deepcopy(stock)
    for model in (stock, ours):
        model.train_adapter(ac.Parallel("a", "b"))
        model.eval()  # no dropout
    with ak.use_backend("reference"), adapterhub.patched(ours):
        for model in (stock, ours):
            model(**models.inputs("gpt2"))[0].pow(3).sum().backward()
    assert len(launches) == 2
    expected = dict(stock.named_parameters())
    seen = set()
    for name, parameter in ours.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
        else:
            seen.add(name.split(".adapters.")[1][0])
            scale = expected[name].grad.abs().max()
            assert (parameter.grad - expected[name].grad).abs().max() <= 1e-3 * scale, name
    assert seen == {"a", "b"}


def test_layers_share_one_layout_that_serves_training_after_inference(launches):
    model = with_setup("bert", "float32", "cpu", SETUPS["parallel"])
    with ak.use_backend("reference"), adapterhub.patched(model):
        mixed._kept.cache_clear()
        with torch.inference_mode():
            model(**models.inputs("bert"))
        model(**models.inputs("bert"))[0].sum().backward()
    layouts = {call.token_slots.data_ptr() for call in launches}
    assert len(launches) == 4
    assert len(layouts) == mixed._kept.cache_info().misses == 1
    model.zero_grad()


def test_a_write_that_torch_does_not_count_is_seen():
    model = copy.deepcopy(model_of("bert", "float32", "cpu"))
    model.set_active_adapters(SETUPS["parallel"])
    with ak.use_backend("reference"), adapterhub.patched(model):
        run(model)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        found = run(model)
    torch.testing.assert_close(found, run(model), rtol=0, atol=2e-6)


# What keeps the loop.


def test_on_the_cpu_the_loop_stays_and_explain_says_why(launches, counted):
    model = bert(SMALL, SMALL)
    model.set_active_adapters(ac.Parallel("a", "b"))
    if mixed.is_served("cpu"):
        pytest.skip("Triton's interpreter serves the CPU here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapterhub.patch(model, strict=True)
        run(model)
    assert not launches
    assert len(counted) == 4
    report = adapterhub.explain(model)
    assert [row.together for row in report.rows] == ["one_by_one"] * 4
    assert f"\n  one_by_one: {GROUP_REASONS['one_by_one']}" in str(report)
    with ak.use_backend("reference"):
        report = adapterhub.explain(model)
    assert {(row.together, row.runs_on) for row in report.rows} == {
        (SAME_LAUNCH, "reference (named)")
    }
    assert str(report).count(SAME_LAUNCH) == 2
    model.set_active_adapters("a")
    assert "together" not in str(adapterhub.explain(model))


UNFIT = {
    "nested": (ac.Parallel(ac.Stack("a", "b"), "c"), (SMALL, SMALL, SMALL), 6),
    "child": (ac.BatchSplit("a", "b", batch_sizes=2), (SMALL, models.UNFIT), 2),
    "differ": (ac.BatchSplit("a", "b", batch_sizes=2), ("par_bn", SMALL), 4),
    "scaling": (ac.Parallel("a", "b"), (SMALL, "seq_bn[scaling='channel']"), 4),
}


@pytest.mark.filterwarnings("ignore:.*ln_after")  # which the adapter itself says
@pytest.mark.parametrize("reason", UNFIT)
def test_what_one_launch_does_not_take_runs_one_by_one_and_says_so(reason, launches, counted):
    setup, configs, fused = UNFIT[reason]
    model = bert(*configs)
    model.set_active_adapters(setup)
    expected = run(model)
    with ak.use_backend("reference"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", adapterhub.FallbackWarning)
            adapterhub.patch(model)
        fast_path.warned.clear()
        with pytest.warns(adapterhub.FallbackWarning, match=rf"one by one \(reason: {reason}, "):
            found = run(model)
        assert {row.together for row in adapterhub.explain(model).rows} - {""} == {reason}
        assert not launches
        assert len(counted) == fused
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model)  # once a reason


@pytest.mark.parametrize("other", ["seq_bn[non_linearity='gelu']", "par_bn", "double"])
def test_adapters_that_differ_are_told_apart(other):
    model = bert(SMALL, SMALL if other == "double" else other)
    if other == "double":
        model.adapter_to("b", dtype=torch.float64)
    model.set_active_adapters(ac.BatchSplit("a", "b", batch_sizes=2))
    with ak.use_backend("reference"):
        assert {row.together for row in adapterhub.explain(model).rows} - {""} == {"differ"}


def test_a_learned_scaling_that_widens_the_result_keeps_the_loop(launches):
    model = bert("scaled_par_bn", "par_bn")
    model.set_active_adapters(ac.BatchSplit("a", "b", batch_sizes=2))
    with torch.autocast("cpu", torch.bfloat16), ak.use_backend("reference"):
        expected = run(model)
        adapterhub.patch(model)
        with pytest.warns(adapterhub.FallbackWarning, match=r"\(reason: scaling, "):
            found = run(model)
        assert {row.together for row in adapterhub.explain(model).rows} == {"scaling"}
    assert not launches
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_strict_allows_one_by_one(counted):
    setup, configs, fused = UNFIT["nested"]
    model = bert(*configs)
    model.set_active_adapters(setup)
    with ak.use_backend("reference"):
        adapterhub.patch(model, strict=True)
        with pytest.warns(adapterhub.FallbackWarning, match="one by one"):
            run(model)
    assert len(counted) == fused


@pytest.mark.parametrize("has_all", [True, False])
def test_kernels_that_do_not_take_the_call_leave_it_to_the_loop(
    has_all, spy, monkeypatch, launches
):
    """Different sizes are a feature of their own, which a backend may lack."""
    if has_all:
        monkeypatch.setattr(type(spy), "features", spy.features | GROUPED_FEATURES)
    model = bert(SMALL, "seq_bn[reduction_factor=8]")
    model.set_active_adapters(ac.Parallel("a", "b"))
    adapterhub.patch(model)
    run(model)
    assert (len(launches), len(spy.forwards)) == ((2, 0) if has_all else (0, 4))
    together = {row.together for row in adapterhub.explain(model).rows}
    assert together == {SAME_LAUNCH if has_all else "one_by_one"}


def test_the_transforms_of_torch_func_keep_the_loop(launches):
    model = with_setup("bert", "float32", "cpu", SETUPS["batch_split_of_four"])
    layer = model.get_submodule("encoder.layer.0.output")
    h, inp = torch.randn(2, 4, 3, models.HIDDEN)
    norm = nn.LayerNorm(models.HIDDEN)
    expected = layer.bottleneck_layer_forward(h, inp, norm).detach()

    def total(h):
        return layer.bottleneck_layer_forward(h, inp, norm).square().sum()

    of_stock = torch.func.grad(total)(h)
    with ak.use_backend("reference"), adapterhub.patched(model):
        torch.testing.assert_close(torch.func.grad(total)(h), of_stock)
        assert not launches
        found = layer.bottleneck_layer_forward(h, inp, norm)  # nothing of the transform is left
    assert len(launches) == 1
    torch.testing.assert_close(found, expected)


class OwnSlices(BottleneckLayer):
    def vslice(self, state, slice_obj):
        return super().vslice(state, slice_obj)


def test_a_subclass_with_slices_of_its_own_keeps_the_loop(launches):
    model = bert(SMALL, SMALL)
    model.set_active_adapters(ac.BatchSplit("a", "b", batch_sizes=2))
    model.get_submodule("encoder.layer.0.output").__class__ = OwnSlices
    OwnSlices.forward = lambda self, h, inp: self.bottleneck_layer_forward(h, inp, None)
    with ak.use_backend("reference"), adapterhub.patched(model):
        run(model)
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("setup", "error"),
    [
        (ac.BatchSplit("a", "b", batch_sizes=[1, 2]), IndexError),
        (ac.BatchSplit("i", "h", "h", batch_sizes=[2, 1, 1]), KeyError),
    ],
    ids=["sum", "the-first-is-missing"],
)
def test_errors_are_the_library_s_own(setup, error):
    model = with_setup("bert", "float32", "cpu", setup)
    with pytest.raises(error) as expected:
        run(model)
    with ak.use_backend("reference"), adapterhub.patched(model), pytest.raises(error) as found:
        run(model)
    assert str(found.value) == str(expected.value)


def test_another_dtype_gets_the_hint_that_a_single_adapter_gets():
    model = bert(SMALL, SMALL)
    for name in "ab":
        model.adapter_to(name, dtype=torch.bfloat16)
    model.set_active_adapters(ac.Parallel("a", "b"))
    with ak.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore", adapterhub.FallbackWarning)
        adapterhub.patch(model)
        with pytest.raises(RuntimeError, match=r"hint: model\.adapter_to\('a'"):
            run(model)


def test_unpatching_leaves_no_method_behind():
    own = dict(vars(BottleneckLayer))
    with adapterhub.patched(bert()):
        assert BottleneckLayer.compose_parallel is mixed.compose_parallel
        assert BottleneckLayer.compose_batch_split is mixed.compose_batch_split
    assert dict(vars(BottleneckLayer)) == own


@pytest.mark.thorough
@pytest.mark.usefixtures("recompiled")
def test_a_compiled_model_holds_the_op_of_many_adapters():
    setup = ac.BatchSplit("a", "b", batch_sizes=2)
    model = with_setup("gpt2", "float32", "cpu", setup)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with ak.use_backend("reference"), adapterhub.patched(model):
        expected = model(**models.inputs("gpt2"))[0]
        found = torch.compile(model, backend=backend)(**models.inputs("gpt2"))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    text = "".join(str(m.graph) for g in graphs for m in g.modules() if hasattr(m, "graph"))
    assert text.count("adapterkern.grouped_forward") == 2
    parameters = [p for n, p in model.named_parameters() if ".adapters.b." in n]
    of_graph = torch.autograd.grad(found.square().sum(), parameters)
    of_eager = torch.autograd.grad(expected.square().sum(), parameters)
    for got, wanted in zip(of_graph, of_eager, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# A bank of the adapters in a folder.
