"""A patched model in use: what `patch` leaves as it was, and what it covers."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
import adapters.composition as ac
from adapterhub_models import bert, run
from adapters import AdapterPlusConfig, AdapterSetup
from adapters.methods.bottleneck import BottleneckLayer

from adapterkern.integrations import adapterhub


def test_patch_runs_every_active_layer_and_changes_no_result(counted):
    model = bert("double_seq_bn[reduction_factor=4]")
    expected = run(model)
    assert not counted
    report = adapterhub.patch(model)
    assert len(report.replaced) == len(report.rows) == 4
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


def test_layer_level_folds_the_block_residual_into_one_call(counted):
    model = bert(name="gpt2")
    adapterhub.patch(model)
    run(model, "gpt2")
    assert counted[0].add_input  # t + A(t): one pass over t = h + inp
    assert counted[0].skip is None
    model.add_adapter("d", config="double_seq_bn")
    model.set_active_adapters("d")
    run(model, "gpt2")
    assert counted[-1].add_input
    assert counted[-1].skip.shape == counted[-1].x.shape  # h + A(h) + inp: the add happens inside


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


def test_data_parallel_replicas_run_fused_with_the_same_gradients(counted):
    """The test does what nn.parallel.replicate does to modules, without the devices it needs."""
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

    StochasticDepth.__module__ = "torchvision.ops.stochastic_depth"
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
