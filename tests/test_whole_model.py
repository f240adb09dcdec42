"""Whole models, adapters in every sublayer: twenty training steps fused and eager, same losses."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkern as ak

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY, TOKENS, STEPS = 50, 12, 20


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=32,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


# Name: (model, suffixes of the sublayers' output projections, the activation of its adapters).
MODELS = {
    "bert": (bert, ("attention.output.dense", "output.dense"), "gelu"),
    "gpt2": (gpt2, ("attn.c_proj", "mlp.c_proj"), "relu"),
    "llama": (llama, ("self_attn.o_proj", "mlp.down_proj"), "silu"),
}


class EagerAdapter(nn.Module):
    """The adapter in plain layers, with the parameters of a `BottleneckAdapter`."""

    def __init__(self, adapter: ak.BottleneckAdapter) -> None:
        super().__init__()
        self.down_proj, self.up_proj = adapter.down_proj, adapter.up_proj
        self.activation = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[adapter.activation]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up_proj(self.activation(self.down_proj(x)))


class Adapted(nn.Module):
    """A projection with an adapter behind it."""

    def __init__(self, projection: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.projection, self.adapter = projection, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.projection(x))


def adapted_model(name: str, fused: bool) -> nn.Module:
    """The same weights for fused and eager: both are drawn from one seed in one order."""
    torch.manual_seed(0)
    build, suffixes, activation = MODELS[name]
    model = build().requires_grad_(False)
    places = [path for path, _ in model.named_modules() if path.endswith(suffixes)]
    assert len(places) == 4  # two in each of two layers
    for place in places:
        adapter = ak.BottleneckAdapter(64, 12, activation=activation, init="houlsby")
        parent, _, child = place.rpartition(".")
        owner = model.get_submodule(parent)
        behind = adapter if fused else EagerAdapter(adapter)
        setattr(owner, child, Adapted(getattr(owner, child), behind))
    return model


def train(model: nn.Module) -> tuple[list[float], list[Tensor]]:
    """Losses of STEPS steps on text that counts, and the adapters' final parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        start = torch.randint(0, VOCABULARY, (4, 1), generator=generator)
        ids = (start + torch.arange(TOKENS)) % 10
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in trained]


@pytest.mark.parametrize("name", MODELS)
def test_training_a_model_fused_gives_the_losses_and_weights_of_eager(name):
    fused_losses, fused_weights = train(adapted_model(name, fused=True))
    eager_losses, eager_weights = train(adapted_model(name, fused=False))
    assert len(fused_weights) == len(eager_weights) == 4 * 4
    torch.testing.assert_close(fused_losses, eager_losses, rtol=1e-5, atol=1e-6)
    for fused, eager in zip(fused_weights, eager_weights, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)
    assert fused_losses[-1] < fused_losses[0]  # it learns


def test_identity_adapters_leave_a_model_as_it_was():
    """Freshly inserted, bit for bit."""
    torch.manual_seed(0)
    model = gpt2().eval()
    ids = torch.arange(TOKENS)[None]
    before = model(input_ids=ids).logits
    for block in model.transformer.h:
        block.mlp.c_proj = Adapted(block.mlp.c_proj, ak.BottleneckAdapter(64, 12))
    assert torch.equal(model(input_ids=ids).logits, before)
