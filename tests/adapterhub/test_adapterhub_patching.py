"""What `patch` promises beside the maths: scope, switching, fallbacks, warnings, errors."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
import adapters
import adapters.composition as ac
import transformers as tf
from adapterhub_models import bert, run
from adapters import AdapterPlusConfig, AdapterSetup
from adapters.methods.bottleneck import BottleneckLayer

import adapterkern as ak
from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import fast_path, stock
from adapterkern.integrations.adapterhub.patching import is_installed

STOCK_METHODS = {
    name: getattr(BottleneckLayer, name)
    for name in ("bottleneck_layer_forward", "compose_single", "compose_fuse")
}


def test_patch_runs_every_active_layer_and_changes_no_result(counted):
    model = bert("double_seq_bn[reduction_factor=4]")
    expected = run(model)
    assert not counted
    report = adapterhub.patch(model)
    assert len(report.fused) == len(report.rows) == 4
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    assert len(counted) == 4


def test_patch_touches_no_parameter_key_class_or_config():
    model = bert()
    before = list(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    config = model.adapters_config.to_dict()
    adapterhub.patch(model)
    run(model)
    assert (list(model.state_dict()), {n: type(m) for n, m in model.named_modules()}) == before
    assert model.adapters_config.to_dict() == config


def test_patch_covers_adapters_that_are_added_loaded_and_switched_to_later(counted, tmp_path):
    model = bert()
    adapterhub.patch(model)
    model.add_adapter("later", config="par_bn")
    model.set_active_adapters("later")
    run(model)
    assert len(counted) == 2
    model.save_adapter(str(tmp_path), "later")
    model.delete_adapter("later")
    model.load_adapter(str(tmp_path), load_as="loaded", set_active=True)
    run(model)
    assert len(counted) == 4
    with AdapterSetup(ac.Stack("a", "loaded")):
        run(model)
    assert len(counted) == 8
    model.set_active_adapters(None)
    run(model)
    assert len(counted) == 8


def test_average_adapter_averages_and_runs_fused(counted):
    model = bert("seq_bn", "seq_bn")
    adapterhub.patch(model)
    model.average_adapter("mean", ["a", "b"], weights=[0.25, 0.75])
    averaged, *parts = (
        model.get_submodule(f"encoder.layer.0.output.adapters.{n}.adapter_up").weight
        for n in ("mean", "a", "b")
    )
    torch.testing.assert_close(averaged, 0.25 * parts[0] + 0.75 * parts[1])
    model.set_active_adapters("mean")
    found = run(model)
    assert len(counted) == 2
    adapterhub.unpatch()
    torch.testing.assert_close(found, run(model), rtol=0, atol=1e-6)


def test_patch_is_idempotent_and_unpatch_restores_the_library():
    model = bert()
    assert adapterhub.patch(model) == adapterhub.patch(model)
    assert BottleneckLayer.compose_single is not STOCK_METHODS["compose_single"]
    adapterhub.unpatch()
    for name, method in STOCK_METHODS.items():
        assert getattr(BottleneckLayer, name) is method
    assert not adapterhub.explain(model).patched


def test_patch_is_per_model(counted):
    ours, theirs = bert(), bert()
    adapterhub.patch(ours)
    run(theirs)
    assert not counted
    run(ours)
    assert len(counted) == 2
    adapterhub.unpatch(ours)
    run(ours)
    assert len(counted) == 2


def test_patch_without_a_model_covers_all_and_one_can_be_taken_out(counted):
    first = bert()
    adapterhub.patch()
    run(first)
    run(bert())
    assert len(counted) == 4
    adapterhub.unpatch(first)
    run(first)
    assert len(counted) == 4


def test_patched_restores_what_was_before(counted):
    model, other = bert(), bert()
    with adapterhub.patched(model):
        run(model)
    assert len(counted) == 2
    assert not is_installed()
    adapterhub.patch(other)
    with adapterhub.patched(model):
        run(model)
    run(model)
    assert len(counted) == 4
    run(other)
    assert len(counted) == 6
    with pytest.raises(RuntimeError, match="boom"), adapterhub.patched(other, layer_level=False):
        raise RuntimeError("boom")
    assert fast_path.level_of(other.adapters_config) == fast_path.LAYER


def test_blocks_that_are_not_nested_leave_each_other_s_models_alone(counted):
    first, second, third = bert(), bert(), bert()
    outer, inner = adapterhub.patched(first), adapterhub.patched(second)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    run(first)
    assert not counted
    run(second)
    assert len(counted) == 2
    inner.__exit__(None, None, None)
    assert not is_installed()
    adapterhub.patch(third, strict=True)
    run(third)
    assert len(counted) == 4


def test_what_is_patched_within_a_block_of_another_model_stays_patched(counted):
    first, second = bert(), bert()
    with adapterhub.patched(first):
        adapterhub.patch(second)
    run(first)
    assert not counted
    run(second)
    assert len(counted) == 2


@pytest.mark.parametrize("everything", [True, False], ids=["all-models", "one-model"])
def test_unpatching_within_a_block_leaves_nothing_half_patched(counted, everything):
    model, other = bert(), bert()
    adapterhub.patch(model)
    with adapterhub.patched(model):
        adapterhub.unpatch(None if everything else model)
        run(model)
        assert not counted
    assert adapterhub.explain(model).patched == (not everything)
    assert is_installed() == (not everything)
    run(model)
    assert len(counted) == (0 if everything else 2)
    adapterhub.patch(other)
    run(other)
    assert len(counted) == (2 if everything else 4)


def test_unpatching_one_model_spares_others_that_the_collector_does_not_show(counted):
    first, second = bert(), bert()
    adapterhub.patch(first)
    adapterhub.patch(second)
    twin = copy.deepcopy(second)
    del second
    gc.collect()
    gc.freeze()
    try:
        adapterhub.unpatch(first)
    finally:
        gc.unfreeze()
    run(twin)
    assert len(counted) == 2


def test_patch_without_a_model_covers_models_that_were_taken_out_or_patched_otherwise(counted):
    out, lower = bert(), bert()
    adapterhub.patch()
    adapterhub.unpatch(out)
    adapterhub.patch(lower, layer_level=False)
    adapterhub.patch()
    for model in (out, lower):
        assert fast_path.level_of(model.adapters_config) == fast_path.LAYER
    run(out)
    assert len(counted) == 2


def test_unpatching_the_last_model_restores_the_library():
    first, second = bert(), bert()
    adapterhub.patch(first)
    adapterhub.patch(second)
    adapterhub.unpatch(first)
    assert BottleneckLayer.compose_single is not STOCK_METHODS["compose_single"]
    assert adapterhub.explain(second).patched
    twin = copy.deepcopy(second)  # patched as well, and known to nobody
    adapterhub.unpatch(second)
    assert adapterhub.explain(twin).patched
    adapterhub.unpatch(twin)
    for name, method in STOCK_METHODS.items():
        assert getattr(BottleneckLayer, name) is method
    with pytest.raises(ValueError, match="no model is patched"):
        adapterhub.unpatch()


def test_patched_without_a_model_leaves_what_was_said_of_single_ones():
    model, out = bert(), bert()
    adapterhub.patch(model, layer_level=False)
    with adapterhub.patched(strict=True):
        assert fast_path.level_of(model.adapters_config) == fast_path.LAYER
        assert fast_path.is_strict(out.adapters_config)
    assert fast_path.level_of(model.adapters_config) == fast_path.ADAPTER
    assert fast_path.level_of(out.adapters_config) == fast_path.OFF
    assert not fast_path.is_strict(out.adapters_config)


UNFIT = "seq_bn[reduction_factor=4,ln_after=True]"


@pytest.mark.parametrize("everything", [True, False], ids=["all-models", "one-model"])
def test_strict_raises_for_what_comes_later_at_its_first_call(counted, everything):
    model = bert()
    adapterhub.patch(None if everything else model, strict=True)
    run(model)
    assert len(counted) == 2
    model.add_adapter("later", config=UNFIT)
    model.set_active_adapters("later")
    message = r"strict=True, and adapter 'later', output_adapter of layer 0 .*reason: ln_after"
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=message):
        run(model)
    fast_path.warned.add("ln_after")  # as if it had been warned about
    adapterhub.patch(None if everything else model)
    run(model)
    assert len(counted) == 2


def test_strict_is_of_the_models_that_it_was_said_of():
    ours, theirs = bert(), bert(UNFIT)
    adapterhub.patch(ours, strict=True)
    run(theirs)
    with pytest.warns(adapterhub.FallbackWarning):
        adapterhub.patch(theirs)
    run(theirs)
    fusion = ac.Fuse("a", "b")
    ours.add_adapter("b", config="seq_bn[reduction_factor=4]")
    ours.add_adapter_fusion(fusion)
    ours.set_active_adapters(fusion)
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="reason: fuse"):
        run(ours)


def test_a_flag_of_an_earlier_patch_does_not_come_alive_again(counted):
    old, new = bert(), bert()
    adapterhub.patch(old)
    adapterhub.unpatch()
    adapterhub.patch(new)
    run(old)
    assert not counted


def test_layer_level_folds_the_block_residual_into_one_call(counted):
    model = bert(name="gpt2")
    adapterhub.patch(model)
    run(model, "gpt2")
    x, *_, residual, skip, _ = counted[0]
    assert residual is x  # t + A(t): one pass over t = h + inp
    assert skip is None
    model.add_adapter("d", config="double_seq_bn")
    model.set_active_adapters("d")
    run(model, "gpt2")
    x, *_, residual, skip, _ = counted[-1]
    assert residual is x
    assert skip.shape == x.shape  # h + A(h) + inp: the block's add happens inside


def test_deepcopy_and_pickle_keep_working_and_need_no_adapterkern(counted):
    model = bert()
    expected = run(model)
    adapterhub.patch(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(run(twin), expected, rtol=0, atol=1e-6)
    assert len(counted) == 2
    adapter = model.get_submodule("encoder.layer.0.output").adapters["a"]
    for part in (model.adapters_config, adapter):
        assert b"adapterkern." not in pickle.dumps(part)


def test_a_pickle_does_not_carry_the_patch_into_another_process(counted):
    model = bert()
    adapterhub.patch(model)
    config = pickle.loads(pickle.dumps(model.adapters_config))
    assert fast_path.level_of(config) == fast_path.LAYER
    adapterhub.unpatch()
    adapterhub.patch(bert())  # as in a process that patched a model of its own
    assert fast_path.level_of(config) == fast_path.OFF


def test_data_parallel_replicas_run_fused_with_the_same_gradients(counted):
    """What nn.parallel.replicate does to modules, without the devices it needs."""
    model = bert()
    layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer) and len(m.adapters))
    adapter = layer.adapters["a"]
    x = torch.randn(2, 3, models.HIDDEN)
    expected = layer.bottleneck_layer_forward(x, x, None)
    weights = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters()}

    def replicate(module: nn.Module, prefix: str = "") -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicate(child, f"{prefix}{name}.")
        for name, parameter in module._parameters.items():
            setattr(replica, name, weights.get(prefix + name, parameter))
        return replica

    replica = layer._replicate_for_data_parallel()
    holder = layer.adapters._replicate_for_data_parallel()
    holder._modules = {"a": replicate(adapter)}
    replica._modules = {**layer._modules, "adapters": holder}
    adapterhub.patch(model)
    output = replica.bottleneck_layer_forward(x, x, None)
    assert len(counted) == 1
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    output.sum().backward()
    assert weights["adapter_up.weight"].grad.abs().sum() > 0


def test_threads_with_setups_of_their_own_do_not_disturb_each_other():
    model = bert("seq_bn[reduction_factor=4]", "double_seq_bn[reduction_factor=4]")
    setups = [ac.Stack("a"), ac.Stack("b"), ac.Stack("a", "b")]
    expected = []
    for setup in setups:
        with AdapterSetup(setup):
            expected.append(run(model))
    adapterhub.patch(model)
    errors = []

    def work(index: int) -> None:
        for _ in range(5):
            with AdapterSetup(setups[index]):
                errors.append((run(model) - expected[index]).abs().max().item())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 15
    assert max(errors) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(counted):
    model = bert()
    model.train_adapter("a")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.p = 0.0

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**models.inputs("bert"))[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapterhub.patch(model)
    found = gradients()
    assert len(counted) == 4  # twice a layer
    assert len(found) == len(expected) == 8
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_half_precision_models_keep_their_dtype(counted):
    for dtype in (torch.bfloat16, torch.float16):
        model = bert().to(dtype)
        expected = run(model)
        with adapterhub.patched(model):
            output = run(model)
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected, rtol=0, atol=0.05)
    assert len(counted) == 4


def test_adapter_plus_runs_fused_in_evaluation_and_stock_in_training(counted):
    class StochasticDepth(nn.Module):  # torchvision's: drops rows while training
        def forward(self, x):
            return x * 0.5 if self.training else x

    model = bert(AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0))
    for module in model.modules():
        if type(module).__name__ == "Adapter":
            module.DropPath = StochasticDepth().eval()
    expected = run(model)
    adapterhub.patch(model)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    assert len(counted) == 2
    model.train()
    reasons = {row.reason for row in adapterhub.explain(model).rows}
    assert reasons == {"stochastic_depth"}
    with pytest.warns(adapterhub.FallbackWarning, match="stochastic_depth"):
        run(model)
    assert len(counted) == 2


# Errors


def test_a_float32_adapter_on_a_half_precision_model_names_the_cure():
    model = models.build("bert").to(torch.bfloat16)
    model.add_adapter("a", config="seq_bn", set_active=True)
    assert {row.reason for row in adapterhub.explain(model).rows} == {"dtype"}
    with pytest.warns(adapterhub.FallbackWarning, match="dtype"):
        adapterhub.patch(model)
    with pytest.raises(RuntimeError, match=r"model\.adapter_to\('a', dtype=torch\.bfloat16\)"):
        run(model)
    model.adapter_to("a", dtype=torch.bfloat16)
    assert run(model).dtype == torch.bfloat16


def test_a_model_without_adapters_is_refused():
    model = tf.BertModel(models.CONFIGS["bert"]().config)
    for function in (adapterhub.patch, adapterhub.unpatch, adapterhub.explain):
        with pytest.raises(ValueError, match=r"adapters\.init"):
            function(model)
    assert not is_installed()


@pytest.mark.parametrize("function", ["patch", "unpatch", "explain"])
def test_what_is_no_model_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        getattr(adapterhub, function)("x")
    assert not is_installed()


def test_errors_and_warnings_have_names_in_the_package():
    assert ak.UnsupportedAdapterError is adapterhub.UnsupportedAdapterError
    assert ak.FallbackWarning is adapterhub.FallbackWarning


def test_unpatching_what_is_not_patched_is_refused():
    model = bert()
    with pytest.raises(ValueError, match="not patched"):
        adapterhub.unpatch(model)
    with pytest.raises(ValueError, match="no model is patched"):
        adapterhub.unpatch()
    adapterhub.patch(bert())
    with pytest.raises(ValueError, match="not patched"):
        adapterhub.unpatch(model)


def test_an_unknown_version_is_named_and_nothing_is_patched(monkeypatch):
    def post_forward(self, hidden_states, input_hidden_states, input_tensor, layer_norm):
        return hidden_states

    monkeypatch.setattr(stock.Adapter, "post_forward", post_forward)
    monkeypatch.setattr(adapters, "__version__", "9.0.0")
    with pytest.raises(ImportError, match=r"adapters 9\.0\.0 .*\n  - Adapter\.post_forward has"):
        adapterhub.patch(bert())
    assert BottleneckLayer.compose_single is STOCK_METHODS["compose_single"]


def test_the_installed_version_is_known():
    assert stock.require_known_version() == adapters.__version__


# explain


def test_explain_reads_well_on_a_mixed_model():
    model = bert("seq_bn[reduction_factor=4]", "double_seq_bn[ln_after=True]")
    text = str(adapterhub.explain(model))
    assert text.splitlines()[0] == (
        "2 of 6 adapter layers would run fused (not patched: all of it runs the library's code)"
    )
    cells = [line.split() for line in text.splitlines()[1:5]]
    assert cells[0][:3] == ["layer", "location", "adapter"]
    assert cells[2][0] == "encoder.layer.{0-1}.output"
    assert cells[2][1:] == ["output_adapter", "a", "32", "8", "relu", "fused"]
    assert text.splitlines()[-1].startswith("  ln_after: it has a LayerNorm of its own")


def test_explain_names_activations_of_what_is_not_fused_too():
    model = bert(UNFIT, "seq_bn[non_linearity='mish']", "compacter++[reduction_factor=4]")
    shown = {(row.adapter, row.activation, row.path) for row in adapterhub.explain(model).rows}
    assert shown == {
        ("a", "relu", "fallback"),
        ("b", "MishActivation", "fallback"),
        ("c", "gelu", "fallback"),
    }


def test_explain_respects_a_surrounding_setup():
    model = bert("seq_bn[reduction_factor=4]", "seq_bn[reduction_factor=4]")
    model.add_adapter_fusion(ac.Fuse("a", "b"))
    with AdapterSetup(ac.Fuse("a", "b")):
        assert {row.reason for row in adapterhub.explain(model).rows} == {"fuse"}
    assert {row.reason for row in adapterhub.explain(model).rows} == {""}


def test_explain_tells_models_of_one_container_apart():
    both = nn.ModuleList([bert(), bert()])
    adapterhub.patch(both[0])
    report = adapterhub.explain(both)
    assert str(report).splitlines()[0] == "2 of 4 adapter layers run fused (patched)"
    assert {(row.layer[0], row.reason) for row in report.rows} == {("0", ""), ("1", "unpatched")}


@pytest.mark.parametrize("config", ["seq_bn", "mam"])
def test_explain_sees_another_dtype_beside_heads_and_other_methods(config):
    model = adapters.BertAdapterModel(models.CONFIGS["bert"]().config).to(torch.bfloat16)
    model.add_classification_head("a")
    model.add_adapter("a", config=config, set_active=True)
    assert {row.reason for row in adapterhub.explain(model).rows} == {"dtype"}
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="adapter_to"):
        adapterhub.patch(model, strict=True)
    model.adapter_to("a", dtype=torch.bfloat16)
    assert {row.reason for row in adapterhub.explain(model).rows} == {""}
