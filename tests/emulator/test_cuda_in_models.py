"""The CUDA kernels where users call them: function, module, PEFT, by name and by "auto"."""

import copy

import pytest
import torch
from emulated import emulated

import adapterkern as ak


@pytest.fixture(autouse=True)
def cpu_as_gpu(kernels):
    with emulated(kernels):
        yield


def largest_difference(found, wanted) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))


def test_auto_takes_the_kernels_where_triton_cannot_run():
    adapter = ak.BottleneckAdapter(24, 8)
    explanation = ak.explain(adapter, torch.randn(3, 24))
    assert explanation.backend == "cuda"
    assert "device cpu is not supported" in str(explanation)  # of triton


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_module_trains_on_the_kernels_as_on_the_reference(backend):
    ours = ak.BottleneckAdapter(24, 8, init="bert", scaling="learned", backend=backend)
    theirs = copy.deepcopy(ours)
    theirs.backend = "reference"
    x = torch.randn(2, 5, 24)
    results = []
    for adapter in (ours, theirs):
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            y = adapter(x, skip=x)
            y.square().mean().backward()
            optimizer.step()
        results.append((y, *adapter.parameters()))
    assert largest_difference(*results) < 1e-6


def test_peft_model_trains_on_the_kernels_as_on_the_reference():
    peft = pytest.importorskip("peft", reason="the PEFT plug-in needs peft")
    transformers = pytest.importorskip("transformers", reason="whole models need transformers")
    from adapterkern.integrations.peft import BottleneckConfig

    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    base = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(61, (2, 16))
    losses = {}
    for backend in ("cuda", "reference"):
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(base), BottleneckConfig(bottleneck_size=6))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses[backend] = []
        with ak.use_backend(backend):
            for _ in range(4):
                loss = model(input_ids=tokens, labels=tokens).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.item())
    assert losses["cuda"][-1] < losses["cuda"][0] - 0.01
    assert losses["cuda"] == pytest.approx(losses["reference"], rel=1e-5)
