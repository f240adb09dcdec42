"""Adapters that stay on the library's path say so and keep their behaviour."""

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
import adapters.composition as ac
from adapterhub_models import bert, run

from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import fast_path
from adapterkern.integrations.adapterhub.patching import is_installed


def hook(model: nn.Module) -> None:
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.non_linearity.register_forward_hook(lambda *_: None)


def override(model: nn.Module) -> None:
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.adapter_up.forward = lambda x, f=adapter.adapter_up.forward: f(x)


def wrap(model: nn.Module) -> None:
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    nn.utils.parametrizations.weight_norm(adapter.adapter_up)


def quantise(model: nn.Module) -> None:
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.adapter_up = torch.ao.nn.quantized.dynamic.Linear(8, models.HIDDEN)


def subclass(model: nn.Module) -> None:
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.__class__ = type("MyAdapter", (type(adapter),), {})


def to_meta(model: nn.Module) -> None:
    model.get_submodule("encoder.layer.0.output").adapters["a"].to("meta")


def partition(model: nn.Module) -> None:
    """Leave parameters as DeepSpeed ZeRO-3 does outside of their module's own forward."""
    model.get_submodule("encoder.layer.0.output").adapters[
        "a"
    ].adapter_up.weight.data = torch.empty(0)


def partition_bias(model: nn.Module) -> None:
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.adapter_up.bias.data = torch.empty(0)


def partition_scaling(model: nn.Module) -> None:
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.scaling = nn.Parameter(torch.empty(0))


def mark_for_deepspeed(model: nn.Module) -> None:
    model.get_submodule("encoder.layer.0.output").adapters["a"].adapter_down[0].bias.ds_id = 3


def shard_bias(model: nn.Module) -> None:
    class Sharded(torch.Tensor):
        pass

    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.adapter_up.bias = nn.Parameter(adapter.adapter_up.bias.detach().as_subclass(Sharded))


@pytest.mark.parametrize(
    ("reason", "config"),
    [
        ("phm", "compacter++[reduction_factor=4]"),
        ("gating", "seq_bn[use_gating=True]"),
        ("ln_before", "seq_bn[ln_before=True]"),
        ("ln_after", "seq_bn[ln_after=True]"),
        ("activation", "seq_bn[non_linearity='mish']"),
    ],
)
def test_unsupported_configurations_stay_stock_and_say_why(reason, config, counted):
    model = bert(config)
    expected = run(model)
    with pytest.warns(adapterhub.FallbackWarning, match=rf"2 of 2 .*reason: {reason}"):
        report = adapterhub.patch(model)
    assert [row.reason for row in report.rows] == [reason] * 2
    assert reason in str(report)
    assert torch.equal(run(model), expected)
    assert not counted
    adapterhub.unpatch()
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=r"layer\.1\.output \(a\)"):
        adapterhub.patch(model, strict=True)
    assert not is_installed()


@pytest.mark.parametrize("change", [hook, override, wrap, subclass], ids=lambda f: f.__name__)
def test_changed_modules_stay_stock_and_keep_their_behaviour(change, counted):
    model = bert()
    change(model)
    expected = run(model)
    with pytest.warns(adapterhub.FallbackWarning, match="1 of 2"):
        report = adapterhub.patch(model)
    assert [row.runs_on for row in report.rows] == ["library", "reference"]
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    assert len(counted) == 1


def fully_shard(model: nn.Module) -> None:
    """FSDP2 gives a module a class of its own, of which its mix-in is the first base."""

    class FSDPModule:
        pass

    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.__class__ = type("FSDPAdapter", (FSDPModule, type(adapter)), {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantise, "quantized"),
        (fully_shard, "sharded"),
        (to_meta, "sharded"),
        (partition, "sharded"),
        (partition_bias, "sharded"),
        (partition_scaling, "sharded"),
        (mark_for_deepspeed, "sharded"),
        (shard_bias, "sharded"),
        (hook, "hooks"),
    ],
)
def test_explain_names_the_reason_of_a_changed_module(change, reason):
    model = bert()
    change(model)
    assert [row.reason for row in adapterhub.explain(model).rows] == [reason, ""]


def test_a_hook_on_an_inner_module_still_runs(counted):
    model = bert()
    seen = []
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.adapter_down[1].register_forward_hook(lambda *args: seen.append(args[2]))
    with pytest.warns(adapterhub.FallbackWarning, match="hooks"):
        adapterhub.patch(model)
    run(model)
    assert len(seen) == 1
    assert len(counted) == 1


def test_dropout_runs_stock_in_training_and_fused_in_evaluation(counted):
    model = bert("seq_bn[dropout=0.5]")
    adapterhub.patch(model)
    run(model)
    assert len(counted) == 2
    model.train()
    with pytest.warns(adapterhub.FallbackWarning, match="dropout"):
        run(model)
    assert len(counted) == 2


def test_a_runtime_reason_warns_once_a_process(counted):
    model = bert("seq_bn[reduction_factor=4]", "seq_bn[reduction_factor=4]")
    fusion = ac.Fuse("a", "b")
    model.add_adapter_fusion(fusion)
    adapterhub.patch(model)
    model.set_active_adapters(fusion)
    with pytest.warns(adapterhub.FallbackWarning, match="fuse"):
        run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)
    assert not counted
    assert {row.reason for row in adapterhub.explain(model).rows} == {"fuse"}


def test_gating_scores_come_from_the_library(counted):
    model = bert("unipelt")
    with pytest.warns(adapterhub.FallbackWarning, match="gating"):
        adapterhub.patch(model)
    with torch.no_grad():
        output = model(**models.inputs("bert"), output_adapter_gating_scores=True)
    assert "a" in output["adapter_gating_scores"]
    assert not counted


def test_mam_and_ungated_unions_run_fused(counted):
    from adapters import ConfigUnion, LoRAConfig, PrefixTuningConfig, SeqBnConfig

    union = ConfigUnion(PrefixTuningConfig(), SeqBnConfig(reduction_factor=4), LoRAConfig())
    model = bert("mam", union)
    for name in "ab":
        model.set_active_adapters(name)
        expected = run(model)
        with adapterhub.patched(model):
            torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    assert len(counted) == 4


def test_leave_out_layer_factors_and_skipped_layers_are_kept(counted):
    from adapters import SeqBnConfig

    factors = {"1": 8, "default": 4}
    model = bert(SeqBnConfig(reduction_factor=factors), SeqBnConfig(leave_out=[0]))
    adapterhub.patch(model)
    sizes = [row.bottleneck_size for row in adapterhub.explain(model).rows if row.adapter == "a"]
    assert sizes == [8, 4]
    run(model)
    assert len(counted) == 2
    model.set_active_adapters("b")
    run(model)
    assert len(counted) == 3
    model.set_active_adapters("a", skip_layers=[1])
    run(model)
    assert len(counted) == 4


def test_a_changed_adapter_is_never_run_from_memory():
    """Whatever decides the result is read at every call."""
    model = bert()
    adapterhub.patch(model)
    run(model)
    adapters_ = [m for m in model.modules() if type(m).__name__ == "Adapter"]
    for adapter in adapters_:
        adapter.scaling = 0.25
        adapter.adapter_down[1].f = nn.Tanh()
        adapter.original_ln_before = False
        adapter.adapter_up.weight = nn.Parameter(adapter.adapter_up.weight.detach() * 2)
    found = run(model)
    adapterhub.unpatch()
    torch.testing.assert_close(found, run(model), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_holds_plain_operations(counted):
    model = bert()
    adapterhub.patch(model)
    layer = model.get_submodule("encoder.layer.1.output")
    inputs = torch.randn(1, 2, models.HIDDEN), torch.randn(1, 2, models.HIDDEN)
    before = layer(*inputs)
    assert len(counted) == 1
    traced = torch.jit.trace(layer, inputs, check_trace=False)
    assert "adapterkern" not in str(traced.inlined_graph)
    assert len(counted) == 1
    torch.testing.assert_close(traced(*inputs), before)


def test_an_exported_layer_holds_plain_operations(counted):
    model = bert()
    adapterhub.patch(model)
    layer = model.get_submodule("encoder.layer.1.output")
    inputs = torch.randn(1, 2, models.HIDDEN), torch.randn(1, 2, models.HIDDEN)
    exported = torch.export.export(layer, inputs)
    assert "adapterkern" not in str(exported.graph)
    assert not counted
    torch.testing.assert_close(exported.module()(*inputs), layer(*inputs))


def test_a_global_hook_still_sees_every_module(counted):
    model = bert()
    adapterhub.patch(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        with pytest.warns(adapterhub.FallbackWarning, match="hooks"):
            run(model)
    finally:
        handle.remove()
    assert seen.count("Adapter") == 2
    assert not counted


def test_second_derivatives_are_those_of_stock():
    model = bert("double_seq_bn[reduction_factor=4]")
    layer = model.get_submodule("encoder.layer.1.output")

    def second_derivative() -> torch.Tensor:
        torch.manual_seed(0)
        h = torch.randn(1, 2, models.HIDDEN, requires_grad=True)
        output = layer.bottleneck_layer_forward(h, h.detach(), None)
        (first,) = torch.autograd.grad(output.square().sum(), h, create_graph=True)
        return torch.autograd.grad(first.square().sum(), h)[0]

    expected = second_derivative()
    adapterhub.patch(model)
    torch.testing.assert_close(second_derivative(), expected, rtol=1e-4, atol=1e-4)


def graphs_of(model: nn.Module) -> tuple[nn.Module, list]:
    """A compiled model, and the list that its graphs will go to."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    return torch.compile(model, backend=backend), graphs


def holds_the_operation(graph) -> bool:
    return any("adapterkern" in str(m.graph) for m in graph.modules() if hasattr(m, "graph"))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "setup"),
    [
        ("bert", "a"),
        ("gpt2", "a"),
        ("qwen2-hooks", "a"),
        ("bert", ac.Stack("a", "b")),
        ("gpt2", ac.Parallel("a", "b")),
    ],
    ids=str,
)
def test_compile_makes_no_graph_more_than_stock_and_puts_the_operation_into_it(name, setup):
    if name not in models.CONFIGS:
        pytest.skip("this version of the library has no hooks")
    model = bert(*["seq_bn[reduction_factor=4]"] * 2, name=name)
    model.set_active_adapters(setup)
    inputs = models.inputs(name)
    compiled, stock = graphs_of(model)
    expected = compiled(**inputs)[0]
    with pytest.warns(adapterhub.FallbackWarning, match=r"call torch\.compiler\.reset\(\)"):
        adapterhub.patch(model)
    compiled, graphs = graphs_of(model)
    torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == len(stock)
    assert sum(map(holds_the_operation, graphs)) > 0
    if setup == "a":
        assert len(graphs) == 1
    torch.compiler.reset()
    adapterhub.unpatch()
    fast_path.warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", adapterhub.FallbackWarning)
        adapterhub.patch(model)  # nothing is compiled any more


@pytest.mark.thorough
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_eager_use_of_models_compiles_no_compiled_one_anew(patched):
    model, other = bert(), bert(name="gpt2")
    unfit = bert("seq_bn[ln_after=True]", "seq_bn[non_linearity='mish']")
    fast_path._usual_classes.clear()
    if patched:
        adapterhub.patch(model)
    for what in (model, unfit):
        compiled, graphs = graphs_of(what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if patched:
                adapterhub.patch(unfit)
            fast_path.warned.clear()
            with torch.no_grad():
                compiled(**models.inputs("bert"))
                first = len(graphs)
                if patched:
                    adapterhub.patch(other)
                run(other, "gpt2")
                run(model)
                run(unfit)  # warns for the first time, where it is patched
                compiled(**models.inputs("bert"))
        assert (first, len(graphs)) == (1, 1)
    torch.compiler.reset()


class ActingDropout(nn.Dropout):
    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize(
    ("dropout", "reason"),
    [(nn.Identity(), ""), (nn.Dropout(0.0), ""), (ActingDropout(0.0), "dropout")],
    ids=["identity", "plain", "subclass"],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_other_dropout_modules_keep_their_behaviour(counted, dropout, reason, training):
    check_replaced(counted, "dropout", dropout, reason, training)


def test_other_activation_modules_run_as_what_they_are(counted):
    check_replaced(counted, "adapter_down.1", nn.Tanh(), "", training=False)
    check_replaced(counted, "adapter_down.1", nn.Hardtanh(), "activation", training=False)


def check_replaced(counted, name, module, reason, training):
    counted.clear()
    model = bert()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    adapter.set_submodule(name, module)
    model.train(training)
    torch.manual_seed(0)
    expected = run(model)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with adapterhub.patched(model) as report:
            torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    assert report.rows[0].reason == reason
    assert len(counted) == (1 if reason else 2)


def test_a_fusion_of_an_empty_stack_fails_as_the_library_does():
    model = bert("seq_bn[reduction_factor=4]", "seq_bn[reduction_factor=4,leave_out=[0]]")
    model.add_adapter_fusion(ac.Fuse("b", "a"))
    model.set_active_adapters(ac.Fuse(ac.Stack("b"), "a"))
    for patched in (False, True):
        if patched:
            with pytest.warns(adapterhub.FallbackWarning):
                adapterhub.patch(model)
        with pytest.raises(TypeError, match="expected Tensor as element 0"):
            run(model)
