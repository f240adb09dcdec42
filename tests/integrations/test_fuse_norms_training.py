"""fuse_norms in training: losses, dropout, checkpointing, compilation, threads, exceptions."""

import copy
import threading
import warnings

import pytest
import torch
from fused_models import (
    assert_same,
    base,
    first,
    inputs,
    loss_of,
    pair,
    trainable,
    uneven,
    without_dropout,
)
from random_adapters import randomised
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

import adapterkern as ak
from adapterkern.integrations.peft import BottleneckConfig
from adapterkern.integrations.transformers import explain, fuse_norms, sites, unfuse_norms
from adapterkern.modules.deferral import deferred, is_deferred


@pytest.fixture(autouse=True)
def _warned():
    sites._warned.clear()


def losses_of(model, given, rate, steps=20):
    optimizer = torch.optim.SGD(trainable(model), lr=rate)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("bert", "auto"), ("bert", "reference"), ("llama", "reference"), ("gpt2", "auto")],
)
def test_twenty_steps_have_the_same_losses(name, backend):
    model, fused = (without_dropout(one).train() for one in pair(name))
    assert all(row.fused for row in explain(fused).rows)
    rate = 0.05 if name == "bert" else 1.0  # the language models' outputs are small
    expected = losses_of(model, inputs(name), rate)
    with ak.use_backend(backend):
        found = losses_of(fused, inputs(name), rate)
    assert expected[-1] < 0.98 * expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["bert", "mpnet", "gpt2", "opt"])
def test_dropout_before_the_add_runs_the_model_s_own_forward_in_training(name):
    model, fused = (one.train() for one in pair(name))
    rows = explain(fused).rows
    assert {row.reason for row in rows} == {
        "while training, dropout of p = 0.1 comes between adapter and add; evaluation is fused"
    }
    with pytest.warns(ak.FallbackWarning, match=r"dropout of p = 0\.1 comes between"):
        _same_under_one_seed(model, fused, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ak.FallbackWarning)  # it was said once
        _same_under_one_seed(model, fused, name)
    fused.eval()
    assert all(row.fused for row in explain(fused).rows)


def _same_under_one_seed(model, fused, name):
    results = []
    for one in (model, fused):
        torch.manual_seed(3)
        loss_of(one, inputs(name)).backward()
        results.append([parameter.grad.clone() for parameter in trainable(one)])
        results[-1].append(torch.rand(1))  # the generator is where it was
        one.zero_grad()
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


def test_a_site_without_dropout_is_fused_beside_one_with_it():
    """DistilBERT drops out behind the FFN alone."""
    model, fused = (one.train() for one in pair("distilbert"))
    assert [row.fused for row in explain(fused).rows] == [True, False] * 2
    outputs = []
    for one in (model, fused):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ak.FallbackWarning)
            outputs.append(first(one, **inputs("distilbert")))
    assert_same(*reversed(outputs))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_recomputes_the_fused_pass(name, reentrant):
    model, fused = (without_dropout(one).train() for one in pair(name))
    loss_of(model, inputs(name)).backward()
    fused.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    loss_of(fused, inputs(name)).backward()
    for expected, found in zip(trainable(model), trainable(fused), strict=True):
        assert_same(found.grad, expected.grad, least=1e-7)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "distilbert"])
def test_a_block_compiles_into_one_graph(name):
    _, fused = pair(name)
    block = next(module for module in fused.modules() if "forward" in vars(module))
    h = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
    given = {
        "bert": ((h, h.detach().flip(0)), {}),
        "gpt2": ((h,), {}),
        "distilbert": ((h,), {}),
        "llama": ((h,), {"position_embeddings": (torch.ones(1, 5, 16), torch.zeros(1, 5, 16))}),
    }[name]
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        output = function(*given[0], **given[1])
        output = output[0] if isinstance(output, tuple) else output
        results.append((output, *torch.autograd.grad(output.square().sum(), h)))
    for expected, found in zip(*results, strict=True):
        assert_same(found, expected)


def test_an_exception_inside_of_attention_leaves_the_adapters_in_place():
    model, fused = pair("llama")
    attention = fused.base_model.model.model.layers[0].self_attn
    original = attention.o_proj.base_layer

    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    attention.o_proj.base_layer = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        first(fused, **inputs("llama"))
    attention.o_proj.base_layer = original
    layers = [one.base_model.model.model.layers[0].self_attn.o_proj for one in (model, fused)]
    x = torch.ones(1, 32)
    assert torch.equal(layers[0](x), layers[1](x))
    assert not is_deferred(layers[1].bottleneck_adapter["default"])
    assert_same(first(fused, **inputs("llama")), first(model, **inputs("llama")))


def test_a_deferred_adapter_runs_in_other_threads_and_after_the_block():
    _, fused = pair("bert")
    layer = fused.base_model.model.encoder.layer[0].output.dense
    adapter = layer.bottleneck_adapter["default"]
    x = torch.ones(1, 64)
    expected, elsewhere = layer(x), []
    with deferred(adapter):
        assert torch.equal(layer(x), layer.base_layer(x))
        thread = threading.Thread(target=lambda: elsewhere.append(layer(x)))
        thread.start()
        thread.join()
        with deferred(None):  # a block inside, without an adapter of its own
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer(x), expected)
    assert torch.equal(elsewhere[0], expected)


def test_threads_that_share_a_model_do_not_disturb_each_other():
    model, fused = pair("llama")
    given = inputs("llama")
    expected, found = first(model, **given), []

    def run():
        found.extend(first(fused, **given) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for one in found:
        assert_same(one, expected)


def test_autocast_gives_what_the_model_gives():
    for name in ("bert", "llama"):
        model, fused = pair(name)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = (first(one, **inputs(name)) for one in (model, fused))
        assert found.dtype == expected.dtype
        assert_same(found, expected, torch.bfloat16)


def test_adapters_that_come_later_are_fused_by_another_call():
    model, fused = pair("bert", layers_to_transform=[0])
    assert len(explain(fused).rows) == 2
    for one in (model, fused):
        torch.manual_seed(7)
        one.add_adapter("more", BottleneckConfig(bottleneck_size=3, init="bert"))
        one.set_adapter("more")
    assert [row.fused for row in explain(fused).rows] == [True, True, False, False]
    assert {row.reason for row in explain(fused).rows[2:]} == {"not fused: fuse_norms does it"}
    twin = copy.deepcopy(fused)
    assert all(row.fused for row in fuse_norms(twin).rows)
    for one in (fused, twin):
        assert_same(first(one, **inputs("bert")), first(model, **inputs("bert")))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:adapterkern:adapterkern.FallbackWarning")
def test_a_checkpoint_around_the_layer_alone_gets_the_gradients_of_the_model(when):
    """Computed again in the backward, the layer runs where nothing defers its adapter."""
    gradients = []
    for is_fused in (False, True):
        model = randomised(uneven(without_dropout(base("llama")))).train()
        model.enable_input_require_grads()
        if is_fused and when == "after":
            fuse_norms(model)
        for block in model.base_model.model.model.layers:
            part = block.self_attn
            part.o_proj = checkpoint_wrapper(part.o_proj, checkpoint_impl=CheckpointImpl.REENTRANT)
        if is_fused and when == "before":
            fuse_norms(model)
        loss_of(model, inputs("llama")).backward()
        gradients.append([parameter.grad for parameter in trainable(model)])
    for expected, found in zip(*gradients, strict=True):
        assert_same(found, expected, least=1e-4)
    wrapped = [row.reason for row in explain(model).rows if "o_proj" in row.layer]
    assert len(wrapped) == 2
    assert all("CheckpointWrapper" in reason for reason in wrapped)


def test_dropout_of_the_adapter_itself_is_told_and_draws_the_same_numbers():
    model, fused = pair("bert", without_dropout)
    for one in (model, fused):
        for module in one.train().modules():
            if isinstance(module, ak.BottleneckAdapter):
                module.dropout = 0.3
    rows = explain(fused).rows
    assert all(row.reason.endswith("own dropout of p = 0.3 is active") for row in rows)
    torch.manual_seed(0)
    expected = first(model, **inputs("bert"))
    torch.manual_seed(0)
    with pytest.warns(ak.FallbackWarning, match="the adapter's own dropout"):
        assert torch.equal(first(fused, **inputs("bert")), expected)
    assert all(row.fused for row in explain(fused.eval()).rows)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_replicas_of_data_parallel_run_their_own_parameters(name):
    """The test does what nn.parallel.replicate does to modules, without the devices it needs."""

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for path, child in module._modules.items():
            setattr(replica, path, replicate(child))
        for path, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[path] = None
            else:
                setattr(replica, path, 1.5 * parameter)
        return replica

    model, fused = pair(name)
    expected = first(replicate(model), **inputs(name))
    assert_same(first(replicate(fused), **inputs(name)), expected)
    unfuse_norms(fused)
    assert not any("replicate" in key for module in fused.modules() for key in vars(module))


@pytest.mark.thorough
def test_blocks_compiled_one_by_one_begin_in_any_thread(recompiled):
    """In a thread of its own, where no adapter was deferred before."""
    model, fused = pair("llama")
    for block in fused.base_model.model.model.layers:
        block.compile(backend="eager")
    found = []
    thread = threading.Thread(target=lambda: found.append(first(fused, **inputs("llama"))))
    thread.start()
    thread.join()
    assert_same(found[0], first(model, **inputs("llama")))
