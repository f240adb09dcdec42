"""Blocks found by structure: models that no table knows, and what is refused."""

import logging

import peft
import pytest
import torch
import transformers
from families import AUDIO, TEXT
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig, BottleneckLinear, targets
from adapterkern.integrations.peft.blocks import find_blocks

H = 8


class Attention(nn.Module):
    def __init__(self, width=H):
        super().__init__()
        self.back = nn.Linear(width, H)  # the last that is called comes first
        self.together = nn.Linear(H, 3 * width)

    def forward(self, x):
        q, k, v = self.together(x).chunk(3, -1)
        return self.back(nn.functional.scaled_dot_product_attention(q, k, v))


class Gated(nn.Module):
    """Registered in another order than called, and as wide inside as outside by default."""

    def __init__(self, width=H):
        super().__init__()
        self.b, self.c = nn.Linear(width, H), nn.Linear(H, width)
        self.a = nn.Linear(H, width)

    def forward(self, x):
        return self.b(self.a(x).sigmoid() * self.c(x))


class Block(nn.Module):
    def __init__(self, attention=None, mix=None):
        super().__init__()
        self.look = Attention() if attention is None else attention
        self.mix = Gated(3 * H) if mix is None else mix

    def forward(self, x):
        x = x + self.look(x)
        return x + self.mix(x)


class Inline(Block):
    """The FFN's layers are the block's own, and called by a method that another function calls."""

    def __init__(self):
        super().__init__(mix=nn.Identity())
        self.wide, self.narrow = nn.Linear(H, 20), nn.Linear(20, H)

    def transform(self, x):
        return self.narrow(self.wide(x).relu())

    def forward(self, x):
        x = x + self.look(x)
        return x + torch.utils.checkpoint.checkpoint(self.transform, x, use_reentrant=False)


class Net(nn.Module):
    def __init__(self, block, *more):
        super().__init__()
        self.first, self.stack = nn.Linear(H, H), nn.ModuleList([block, *more])

    def forward(self, x):
        x = self.first(x)
        for block in self.stack:
            x = block(x)
        return x


def found(block):
    blocks = find_blocks(Net(block))
    assert not blocks.problems
    return blocks.attention, blocks.feed_forward


@pytest.mark.parametrize(
    ("block", "feed_forward"),
    [
        (lambda: Block(), {"stack.0.mix.b": "stack.0.mix.a"}),
        (lambda: Block(mix=Gated()), {"stack.0.mix.b": "stack.0.mix.a"}),
        (lambda: Block(Attention(width=12)), {"stack.0.mix.b": "stack.0.mix.a"}),
        (
            lambda: Block(mix=nn.Sequential(nn.Linear(H, 20), nn.ReLU(), nn.Linear(20, H))),
            {"stack.0.mix.2": "stack.0.mix.0"},
        ),
        (lambda: Inline(), {"stack.0.narrow": "stack.0.wide"}),
    ],
    ids=["gated", "as-wide-inside", "narrow-attention", "sequential", "inline"],
)
def test_layers_are_told_by_their_calls_and_widths(block, feed_forward):
    assert found(block()) == (["stack.0.look.back"], feed_forward)


class Experts(nn.Module):
    """All in one: parameters [E, 2F, H] and [E, H, F], as transformers 5 has them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(4, 6, H)), nn.Parameter(torch.ones(4, H, 3))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(H, 4), Experts()

    def forward(self, x):
        return x + self.gate(x).sum(-1, keepdim=True)


class Convolutions(nn.Module):
    """Its weights have three dimensions, as those of experts have, which it has none of."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv1d(H, 20, 1), nn.Conv1d(20, H, 1)

    def forward(self, x):
        return self.down(self.up(x.mT).relu()).mT


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Gated(20), Gated(20)

    def forward(self, x):
        return self.two(self.one(x))


class ByWeight(nn.Module):
    """Attention that reads its last layer's weight and does not call it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.back = (nn.Linear(H, H) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return nn.functional.linear(y, self.back.weight, self.back.bias)


ByWeight.__name__ = "AttentionByWeight"
sourceless = {"nn": nn}
exec(  # as a notebook cell that is gone
    "class Mixer(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)\n"
    "    def forward(self, x):\n"
    "        return self.down(self.up(x))\n",
    sourceless,
)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (Block(mix=Twice()), "several layers that may end its FFN: mix.one.b, mix.two.b"),
        (Block(mix=nn.Identity()), "no FFN of linear layers"),
        (Block(mix=Convolutions()), "no FFN of linear layers"),
        (
            Block(mix=sourceless["Mixer"]()),
            "layers that its source does not call by name: mix.down, mix.up",
        ),
        (Block(ByWeight()), "AttentionByWeight, whose source calls no look.back by name"),
        (
            nn.TransformerEncoderLayer(H, 2, 16, batch_first=True),
            "MultiheadAttention, whose source calls no self_attn.out_proj by name",
        ),
        (Block(nn.MultiheadAttention(H, 2)), "MultiheadAttention, whose source calls no look.out"),
        (Gated(20), "no attention"),
    ],
    ids=[
        "two-ffns",
        "no-ffn",
        "convolutions",
        "no-source",
        "by-weight",
        "torch-layer",
        "torch",
        "no-attention",
    ],
)
def test_unclear_blocks_are_refused_by_name(block, problem):
    net = Net(Block(), block)
    with pytest.raises(ValueError, match=rf"stack.1 \({type(block).__name__}\) has {problem}"):
        peft.get_peft_model(net, BottleneckConfig())
    assert not any(isinstance(module, BottleneckLinear) for module in net.modules())


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("config", "model", "problem"),
    [
        ("WavLMConfig", "WavLMModel", r"WavLMAttention, whose source calls no .*out_proj by"),
        ("Wav2Vec2ConformerConfig", "Wav2Vec2ConformerModel", r"ffn1.output_dense, ffn2.output"),
        ("XLMConfig", "XLMModel", r"attentions.0 \(MultiHeadAttention\) has no FFN"),
        ("XLNetConfig", "XLNetModel", "no list of modules in it has items with attention"),
    ],
)
def test_families_with_other_blocks_are_refused_with_the_reason(config, model, problem):
    """WavLM's attention reads the weight of its output projection: an adapter would not run."""
    options = AUDIO if "Wav" in config else {"n_layers": 2, "n_heads": 2, "vocab_size": 61}
    base = getattr(transformers, model)(getattr(transformers, config)(**options))
    with pytest.raises(ValueError, match=problem):
        peft.get_peft_model(base, BottleneckConfig())


def test_stacked_experts_are_left_out(caplog):
    targets.log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="adapterkern"):
        model = peft.get_peft_model(Net(Block(mix=Router()), Block()), BottleneckConfig())
    layers = [name for name, one in model.named_modules() if isinstance(one, BottleneckLinear)]
    prefix = "base_model.model.stack."
    assert layers == [f"{prefix}0.look.back", f"{prefix}1.look.back", f"{prefix}1.mix.b"]
    assert caplog.messages[1] == (
        "adapterkern: the experts of this 'custom' model get no adapters (stack.*); its dense "
        "layers do: look.back, mix.b."
    )


def test_unknown_model_logs_its_targets_once_and_trains(caplog):
    targets.log_once.cache_clear()
    x = torch.randn(2, 5, H)
    with caplog.at_level(logging.WARNING, logger="adapterkern"):
        for placement in ("houlsby", "parallel", "parallel"):
            net = Net(Block(), Inline())
            config = BottleneckConfig(placement=placement, bottleneck_size=3, init="bert")
            model = peft.get_peft_model(net, config)
            model(x).square().sum().backward()
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            assert len(weights) == 4 * (4 if placement == "houlsby" else 2)
            assert all(weight.grad.abs().max() > 0 for weight in weights)
    assert [record.getMessage() for record in caplog.records] == [
        "adapterkern: default target_modules of model type 'custom', found by structure and not "
        f"tested: {found}. BottleneckConfig(target_modules=[...]) names others."
        for found in ("look.back, mix.b, narrow", "mix.b, narrow")
    ]


def test_second_adapter_and_other_methods_are_seen_through():
    base = transformers.BertModel(transformers.BertConfig(**TEXT))
    expected = find_blocks(base)
    assert len(expected.attention) == len(expected.feed_forward) == 2
    lora = peft.LoraConfig(target_modules=["query", "dense"], r=2)
    base = peft.get_peft_model(base, lora).get_base_model()
    model = peft.get_peft_model(base, BottleneckConfig(init="bert"), "after")
    layers = [one for one in model.modules() if isinstance(one, BottleneckLinear)]
    assert len(layers) == 4
    assert find_blocks(base) == expected
    model.add_adapter("beside", BottleneckConfig(placement="parallel", init="bert"))
    assert model.peft_config["beside"].target_modules == ["output.dense"]
    for name in ("after", "beside"):
        model.set_adapter(name)
        model(torch.randint(3, 60, (2, 5)))[0].square().sum().backward()
    for layer in layers:
        for adapter in layer.bottleneck_adapter.values():
            assert adapter.up_proj.weight.grad.abs().max() > 0
