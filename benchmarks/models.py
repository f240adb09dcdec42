"""Models with random weights, built offline, and the ways to adapt them."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkern as ak

VARIANTS = ("plain", "adapterhub", "lora", "adapterkern")


class MissingPackageError(RuntimeError):
    """A variant whose package is not installed; the message is what its row says."""


@dataclass(frozen=True)
class Spec:
    """One model, its batch, and where adapters of which width go.

    places: name suffixes of the linear layers that an adapter follows (the block has its own);
    family: "block", or a model of transformers.
    """

    name: str
    family: str
    hidden_size: int
    layers: int
    heads: int
    batch: int
    sequence: int
    bottleneck_size: int
    places: tuple[str, ...]
    modes: tuple[str, ...] = ("forward", "step")

    @property
    def per_layer(self) -> int:
        """Adapters in each layer."""
        return 1 if self.places == ("mlp.c_proj",) else 2

    def tiny(self) -> "Spec":
        """The same with widths and a batch that a CPU runs in milliseconds."""
        return replace(
            self,
            hidden_size=32,
            heads=2,
            layers=min(self.layers, 2),
            batch=2,
            sequence=8,
            bottleneck_size=4,
        )


_TWO = ("c_proj",)
_BERT = ("attention.output.dense", r"[0-9]+.output.dense")
SPECS = (
    Spec("block-1024", "block", 1024, 1, 16, 32, 512, 64, ()),
    Spec("block-4096", "block", 4096, 1, 32, 32, 512, 64, ()),
    # Table 1 of the LoRA paper (arXiv:2106.09685): one adapter a layer (L) or two (H).
    Spec("gpt2-medium-32x512-H", "gpt2", 1024, 24, 16, 32, 512, 5, _TWO),
    Spec("gpt2-medium-32x512-L", "gpt2", 1024, 24, 16, 32, 512, 10, ("mlp.c_proj",), ("forward",)),
    Spec("gpt2-medium-16x256-H", "gpt2", 1024, 24, 16, 16, 256, 112, _TWO, ("forward",)),
    Spec("gpt2-medium-16x256-L", "gpt2", 1024, 24, 16, 16, 256, 224, ("mlp.c_proj",), ("forward",)),
    Spec("gpt2-medium-1x128-H", "gpt2", 1024, 24, 16, 1, 128, 112, _TWO, ("forward",)),
    Spec("gpt2-medium-1x128-L", "gpt2", 1024, 24, 16, 1, 128, 224, ("mlp.c_proj",), ("forward",)),
    Spec("bert-base-32x128", "bert", 768, 12, 12, 32, 128, 48, _BERT),
    Spec("llama-7b-block-4x2048", "llama", 4096, 1, 32, 4, 2048, 64, ("o_proj", "down_proj")),
)
# Per cent that adapters add to GPT-2 medium's forward, as published (RTX 8000, float32).
PUBLISHED = {
    "gpt2-medium-32x512-L": 2.2,
    "gpt2-medium-32x512-H": 3.0,
    "gpt2-medium-16x256-L": 5.0,
    "gpt2-medium-16x256-H": 8.4,
    "gpt2-medium-1x128-L": 20.7,
    "gpt2-medium-1x128-H": 30.3,
}


class Block(nn.Module):
    """A post-norm transformer block with an adapter after each sublayer, if any."""

    def __init__(self, spec: Spec, adapter: Callable[[], nn.Module] | None, fold: bool) -> None:
        super().__init__()
        hidden = spec.hidden_size
        self.heads, self.fold = spec.heads, fold
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.widen = nn.Linear(hidden, 4 * hidden)
        self.narrow = nn.Linear(4 * hidden, hidden)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.adapters = nn.ModuleList([adapter(), adapter()] if adapter else [])

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = self._sublayer(0, self.out(self._attention(inputs_embeds)), inputs_embeds)
        return self._sublayer(1, self.narrow(F.gelu(self.widen(x))), x)

    def _attention(self, x: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        heads = self.qkv(x).view(batch, sequence, 3, self.heads, hidden // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)

    def _sublayer(self, index: int, h: Tensor, x: Tensor) -> Tensor:
        if not self.adapters:
            return self.norms[index](h + x)
        if self.fold:
            return self.norms[index](self.adapters[index](h, skip=x))
        return self.norms[index](self.adapters[index](h) + x)


def variants(spec: Spec) -> tuple[str, ...]:
    """The variants of a model: those with the block's residual folded in, and full fine-tuning."""
    more = ("adapterkern-skip",) if spec.family == "block" else ("full",)
    return (*VARIANTS, *more)


def build(spec: Spec, variant: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on the device, random, with the variant's parameters alone to be trained.

    Raises:
        MissingPackageError: the variant's package is not installed.
    """
    torch.manual_seed(0)
    model = _block(spec, variant) if spec.family == "block" else _adapted(spec, variant)
    model = model.to(device, dtype)
    if variant == "plain":
        model.requires_grad_(False)
    return model


def _block(spec: Spec, variant: str) -> nn.Module:
    hidden, bottleneck = spec.hidden_size, spec.bottleneck_size

    def ours() -> nn.Module:
        return ak.BottleneckAdapter(hidden, bottleneck, init="bert")

    def adapterhub() -> nn.Module:
        return _AdapterHub(hidden, bottleneck)

    makers = {"adapterkern": ours, "adapterkern-skip": ours, "adapterhub": adapterhub}
    block = Block(spec, makers.get(variant), fold=variant == "adapterkern-skip")
    block.requires_grad_(False)
    block.adapters.requires_grad_(True)
    if variant != "lora":
        return block
    return _lora(block, ("out", "narrow"), bottleneck)


class _AdapterHub(nn.Module):
    """AdapterHub's `Adapter` with itself as residual, as its layers call it."""

    def __init__(self, hidden: int, bottleneck: int) -> None:
        super().__init__()
        config = _import("adapters").DoubleSeqBnConfig(non_linearity="gelu")
        modeling = _import("adapters.methods.modeling")
        self.adapter = modeling.Adapter("bench", hidden, bottleneck, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x, x)[0]


def _adapted(spec: Spec, variant: str) -> nn.Module:
    model = _base(spec)
    if variant in ("plain", "full"):
        return model
    if variant == "lora":
        return _lora(model, spec.places, spec.bottleneck_size)
    if variant == "adapterhub":
        return _with_adapterhub(model, spec)
    peft = _import("peft")
    plugin = importlib.import_module("adapterkern.integrations.peft")
    config = plugin.BottleneckConfig(
        target_modules=_pattern(spec.places), bottleneck_size=spec.bottleneck_size, init="bert"
    )
    return peft.get_peft_model(model, config)


def _lora(model: nn.Module, places: tuple[str, ...], rank: int) -> nn.Module:
    peft = _import("peft")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=_pattern(places),
        fan_in_fan_out="GPT2" in type(model).__name__,  # whose linear layers are transposed
    )
    return peft.get_peft_model(model, config)


def _pattern(places: tuple[str, ...]) -> str:
    """A regular expression for whole module names that end in one of `places`."""
    return rf"(.*\.)?({'|'.join(place.replace('.', chr(92) + '.') for place in places)})"


def _with_adapterhub(model: nn.Module, spec: Spec) -> nn.Module:
    adapters = _import("adapters")
    adapters.init(model)
    both = spec.per_layer == 2
    config = adapters.BnConfig(
        mh_adapter=both,
        output_adapter=True,
        reduction_factor=spec.hidden_size / spec.bottleneck_size,
        non_linearity="gelu",
    )
    adapted: Any = model
    adapted.add_adapter("bench", config=config)
    adapted.train_adapter("bench")
    return model


def _base(spec: Spec) -> nn.Module:
    transformers = _import("transformers")
    hidden, layers, heads = spec.hidden_size, spec.layers, spec.heads
    if spec.family == "bert":
        config = transformers.BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            vocab_size=64,  # the embedding is not run: the input is already embedded
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertModel(config, add_pooling_layer=False)
    if spec.family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return transformers.GPT2Model(config)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden * 43 // 16,  # 11008 at 4096
        vocab_size=64,
        use_cache=False,
    )
    return transformers.LlamaModel(config)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = " ".join(str(error).split())[:160]
        raise MissingPackageError(
            f"{name.partition('.')[0]} cannot be imported ({text})"
        ) from error


def embedded_input(spec: Spec, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[batch, sequence, H]: what the embedding layer would give."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (spec.batch, spec.sequence, spec.hidden_size)
    return torch.randn(shape, generator=generator, device=device).to(dtype)
