"""Which models are patched, from when to when, and what is refused."""

import copy
import gc
import pickle

import pytest
import torch

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
import adapters
import adapters.composition as ac
import transformers as tf
from adapterhub_models import UNFIT, bert, run
from adapters.methods.bottleneck import BottleneckLayer

import adapterkern as ak
from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import fast_path, stock
from adapterkern.integrations.adapterhub.patching import is_installed

STOCK_METHODS = {
    name: getattr(BottleneckLayer, name)
    for name in ("bottleneck_layer_forward", "compose_single", "compose_fuse")
}


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


def test_a_pickle_does_not_carry_the_patch_into_another_process(counted):
    model = bert()
    adapterhub.patch(model)
    config = pickle.loads(pickle.dumps(model.adapters_config))
    assert fast_path.level_of(config) == fast_path.LAYER
    adapterhub.unpatch()
    adapterhub.patch(bert())  # as in a process that patched a model of its own
    assert fast_path.level_of(config) == fast_path.OFF


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
