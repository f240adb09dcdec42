"""Whole models in ONNX and TorchScript: plain operators, and the model's results for any batch."""

import contextlib
import io

import adapters
import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers
from torch import nn

import adapterkern as ak
from adapterkern.integrations import adapterhub
from adapterkern.integrations.peft import BottleneckConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class HiddenStates(nn.Module):
    """A model as a function of its ids alone, to its last hidden states."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).last_hidden_state


def bert():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=61, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def ids(batch):
    return torch.randint(3, 61, (batch, 5))


def of_peft(stack):
    config = BottleneckConfig(bottleneck_size=4, init="bert", scaling="learned")
    return HiddenStates(peft.get_peft_model(bert(), config)), ids


def of_adapterhub(stack):
    model = bert()
    adapters.init(model)
    model.add_adapter("one", config="double_seq_bn[reduction_factor=4]")
    model.set_active_adapters("one")
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            nn.init.normal_(parameter, std=0.3)
    stack.enter_context(adapterhub.patched(model))
    return HiddenStates(model), ids


def of_a_module(stack):
    adapter = ak.BottleneckAdapter(16, 4, init="bert", scaling=0.5, activation="silu")
    return adapter, lambda batch: torch.randn(batch, 3, 16)


MODELS = {"module": of_a_module, "peft": of_peft, "adapterhub": of_adapterhub}


@pytest.fixture
def stack():
    with contextlib.ExitStack() as opened:
        yield opened


def exported(model, example, dynamo):
    file = io.BytesIO()
    batch = {0: torch.export.Dim("batch", min=2, max=64)} if dynamo else {0: "batch"}
    options = {"dynamic_shapes": (batch,)} if dynamo else {"dynamic_axes": {"input": batch}}
    torch.onnx.export(
        model, (example,), file, input_names=["input"], dynamo=dynamo, verbose=False, **options
    )
    return file.getvalue()


@pytest.mark.sweep("dynamo")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_has_standard_operators_and_our_results(name, dynamo, stack):
    model, example = MODELS[name](stack)
    model.eval()
    content = exported(model, example(2), dynamo)
    graph = onnx.load_from_string(content)
    onnx.checker.check_model(graph)
    used = {node.domain for node in graph.graph.node}
    used |= {node.domain for function in graph.functions for node in function.node}
    assert used <= {"", *(function.domain for function in graph.functions)}
    assert "adapterkern::" not in str(graph.graph)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        given = example(batch)
        (found,) = session.run(None, {"input": given.numpy()})
        with torch.no_grad():
            expected = model(given).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_model_is_saved_and_has_our_results_and_gradients(name, stack):
    model, example = MODELS[name](stack)
    model.eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, example(2), check_trace=False), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "adapterkern::" not in str(loaded.inlined_graph)
    given = example(5)
    found, expected = loaded(given), model(given)
    torch.testing.assert_close(found, expected)
    wanted = {n: p for n, p in model.named_parameters() if "adapter" in n or "proj" in n}
    wanted = {n: p for n, p in wanted.items() if p.requires_grad}
    traced = dict(loaded.named_parameters())
    gradients = torch.autograd.grad(expected.square().sum(), wanted.values())
    replayed = torch.autograd.grad(found.square().sum(), [traced[n] for n in wanted])
    assert len(wanted) >= 4
    for gradient, want in zip(replayed, gradients, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)
