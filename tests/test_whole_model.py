"""Adapters in whole models: training with the fused operation is training with plain layers."""

import copy

import pytest
import torch
from eager import EagerAdapter
from torch import nn

import adapterkern as ak

transformers = pytest.importorskip("transformers", reason="whole models come from transformers")

HIDDEN, BOTTLENECK, VOCABULARY, STEPS = 64, 12, 97, 20
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}


def bert():
    config = transformers.BertConfig(
        hidden_size=HIDDEN, intermediate_size=128, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **SIZES,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config), ("attention.output.dense", "output.dense")


def gpt2():
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=4, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), ("attn.c_proj", "mlp.c_proj")


def llama():
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=128, num_key_value_heads=2, **SIZES
    )
    return transformers.LlamaForCausalLM(config), ("self_attn.o_proj", "mlp.down_proj")


def insert(model, targets, kind):
    """Freeze the model and put an adapter behind every module whose name ends in a target."""
    model.requires_grad_(False)
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if name.endswith(targets):
            torch.manual_seed(seed)
            adapter = ak.BottleneckAdapter(HIDDEN, BOTTLENECK, init="houlsby")
            if kind == "eager":
                plain = EagerAdapter(HIDDEN, BOTTLENECK)
                plain.load_state_dict(adapter.state_dict())
                adapter = plain
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Sequential(module, adapter))
    return model


def train(model, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    generator = torch.Generator().manual_seed(2)
    model.train()
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(VOCABULARY, (4, 9), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), {
        n: p.detach() for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.sweep("build", "checkpointing")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("build", [bert, gpt2, llama], ids=lambda build: build.__name__)
def test_training_is_that_of_plain_layers(build, checkpointing):
    torch.manual_seed(0)
    model, targets = build()
    fused = insert(copy.deepcopy(model), targets, "fused")
    eager = insert(model, targets, "eager")
    assert sum(isinstance(m, ak.BottleneckAdapter) for m in fused.modules()) == 4
    losses, weights = train(fused, checkpointing)
    expected_losses, expected_weights = train(eager, False)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-5, atol=1e-5, msg=name)
    start = dict(insert(build()[0], targets, "fused").named_parameters())
    assert all((weights[name] - start[name]).abs().max() > 1e-3 for name in weights)
