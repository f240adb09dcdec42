"""Models with random weights, built offline, and the ways to adapt them."""

import contextlib
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkern as ak
from benchmarks import attention

VARIANTS = ("plain", "adapterhub", "lora", "adapterkern")
FOLDED = ("adapterkern-skip", "adapterkern-norm")
# One of AdapterHub's models with its own adapters: stock; patched; and patched in the adapter call
# alone, the layer around it left to the library.
PATCHED = ("plain", "adapterhub", "adapterhub-patched", "adapterhub-patched-calls")


class MissingPackageError(RuntimeError):
    """A variant whose package is not installed; the message is what its row says."""


@dataclass(frozen=True)
class Spec:
    """One model, its batch, and where adapters of which width go.

    places: name suffixes of the linear layers that an adapter follows (the block has its own);
    family: "block", or a model of transformers; vocabulary: rows of the embedding; preset:
    AdapterHub's, in place of places and bottleneck_size.
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
    vocabulary: int = 0
    preset: str = ""

    def tiny(self) -> "Spec":
        """Return the same with widths and a batch that a CPU runs in milliseconds."""
        return replace(
            self,
            hidden_size=32,
            heads=2,
            layers=min(self.layers, 2),
            batch=2,
            sequence=8,
            bottleneck_size=4,
            vocabulary=64,
        )


_BERT = ("attention.output.dense", r"[0-9]+.output.dense")


def _gpt2(batch: int, sequence: int, bottleneck: int, *modes: str) -> Spec:
    """Return GPT-2 medium with two adapters a layer, adapter(H) of the paper below."""
    sizes = (1024, 24, 16, batch, sequence, bottleneck)
    name, places = f"gpt2-medium-{batch}x{sequence}-H", ("c_proj",)
    return Spec(name, "gpt2", *sizes, places, modes or ("forward",), vocabulary=50257)


SPECS = (
    Spec("block-1024", "block", 1024, 1, 16, 32, 512, 64, ()),
    Spec("block-4096", "block", 4096, 1, 32, 32, 512, 64, ()),
    # Table 1 of the LoRA paper (arXiv:2106.09685).
    _gpt2(32, 512, 5, "forward", "step"),
    _gpt2(16, 256, 112),
    _gpt2(1, 128, 112),
    Spec("bert-base-32x128", "bert", 768, 12, 12, 32, 128, 48, _BERT, vocabulary=30522),
    # One layer of 32, beside which a whole vocabulary would count for more than in the model.
    Spec(
        *("llama-7b-block-4x2048", "llama", 4096, 1, 32, 4, 2048, 64, ("o_proj", "down_proj")),
        vocabulary=64,
    ),
    # AdapterHub's own adapters on its own models, stock and patched.
    Spec(
        *("bert-base-32x128-seq_bn", "bert", 768, 12, 12, 32, 128, 48, ()),
        vocabulary=30522,
        preset="seq_bn",
    ),
    Spec(
        *("gpt2-medium-16x256-seq_bn", "gpt2", 1024, 24, 16, 16, 256, 64, ()),
        modes=("forward", "step", "decode"),
        vocabulary=50257,
        preset="seq_bn",
    ),
)
# Per cent that adapters add to GPT-2 medium's forward, as published (RTX 8000, float32).
PUBLISHED = {
    "gpt2-medium-32x512-H": 3.0,
    "gpt2-medium-16x256-H": 8.4,
    "gpt2-medium-1x128-H": 30.3,
}


class Block(nn.Module):
    """A post-norm transformer block with an adapter after each sublayer, if any.

    fold: what goes into the adapter's pass: "skip", the block's residual, or "norm", that and the
    norm behind it.
    """

    def __init__(self, spec: Spec, adapter: Callable[[], nn.Module] | None, fold: str = "") -> None:
        super().__init__()
        hidden = spec.hidden_size
        self.heads, self.fold = spec.heads, fold
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.widen = nn.Linear(hidden, 4 * hidden)
        self.narrow = nn.Linear(4 * hidden, hidden)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden), nn.LayerNorm(hidden)])
        self.adapters = nn.ModuleList([adapter(), adapter()] if adapter else [])
        # A list of Python's: the modules in it are children already, with names of their own.
        self.passes = list(map(ak.AdapterNorm, self.adapters, self.norms)) if fold == "norm" else []

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
        if self.fold == "norm":
            return self.passes[index](h, skip=x)
        if self.fold == "skip":
            return self.norms[index](self.adapters[index](h, skip=x))
        return self.norms[index](self.adapters[index](h) + x)


def variants(spec: Spec) -> tuple[str, ...]:
    """Return a model's variants, with the block's residual and norm folded in or full fine-tuning
    too."""
    if spec.preset:
        return PATCHED
    more = FOLDED if spec.family == "block" else ("full",)
    return (*VARIANTS, *more)


def build(spec: Spec, variant: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the model on the device, random, with the variant's parameters alone to be trained.

    Raises:
        MissingPackageError: the variant's package is not installed.
    """
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws the weights of a whole model at once
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

    makers = {**dict.fromkeys(("adapterkern", *FOLDED), ours), "adapterhub": adapterhub}
    fold = variant.removeprefix("adapterkern-") if variant in FOLDED else ""
    block = Block(spec, makers.get(variant), fold)
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
    if variant.startswith("adapterhub"):
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
    """Return a regular expression for whole module names that end in one of `places`."""
    return rf"(.*\.)?({'|'.join(place.replace('.', chr(92) + '.') for place in places)})"


def _with_adapterhub(model: nn.Module, spec: Spec) -> nn.Module:
    adapters = _import("adapters")
    adapters.init(model)
    config: Any = spec.preset or adapters.BnConfig(
        mh_adapter=True,
        output_adapter=True,
        # The library takes the whole part of H over this: half a unit more, and it is R.
        reduction_factor=spec.hidden_size / (spec.bottleneck_size + 0.5),
        non_linearity="gelu",
    )
    adapted: Any = model
    adapted.add_adapter("bench", config=config)
    log = logging.getLogger("adapters.model_mixin")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that no adapter was active before this one
    adapted.train_adapter("bench")
    log.setLevel(level)
    return model


def patched(model: nn.Module, variant: str) -> contextlib.AbstractContextManager[Any]:
    """Return the block within which a patched variant runs fused; one that cannot raises.

    The stock model beside it pays the look at a flag in each layer.
    """
    if not variant.startswith("adapterhub-patched"):
        return contextlib.nullcontext()
    adapterhub = importlib.import_module("adapterkern.integrations.adapterhub")
    return adapterhub.patched(model, strict=True, layer_level=variant == "adapterhub-patched")


def _base(spec: Spec) -> nn.Module:
    transformers = _import("transformers")
    hidden, layers, heads = spec.hidden_size, spec.layers, spec.heads
    if spec.family == "bert":
        config = transformers.BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            vocab_size=spec.vocabulary,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = transformers.BertModel(config, add_pooling_layer=False)
    elif spec.family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=spec.vocabulary,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.GPT2Model(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=hidden * 43 // 16,  # 11008 at 4096
            vocab_size=spec.vocabulary,
            use_cache=False,
        )
        model = transformers.LlamaModel(config)
    attention.leave_masks_out(model)
    return model


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = " ".join(str(error).split())[:160]
        raise MissingPackageError(
            f"{name.partition('.')[0]} cannot be imported ({text})"
        ) from error


def embedder(
    spec: Spec, model: Any, device: torch.device, dtype: torch.dtype, tokens: int | None = None
) -> Callable[[], Tensor]:
    """Return a function that embeds the model's token ids anew: [batch, tokens (the sequence), H].

    Its result carries a gradient where the embedding is trained, as in full fine-tuning. A block
    has no embedding and gets random values.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = spec.batch, tokens or spec.sequence
    if spec.family == "block":
        wide = (*shape, spec.hidden_size)
        return torch.randn(wide, generator=generator, device=device).to(dtype).detach
    ids = torch.randint(spec.vocabulary, shape, generator=generator, device=device)
    embedding = model.get_input_embeddings()
    return lambda: embedding(ids)


def past_of(model: nn.Module, embedded: Tensor) -> Any:
    """Return all layers' keys and values of a prompt [B, S, H], the same for each decoded token."""
    cache = _import("transformers").DynamicCache

    class Past(cache):  # type: ignore[misc,valid-type]
        """Gives each token the prompt and itself, and forgets the token."""

        full = False

        def update(self, key: Tensor, value: Tensor, layer: int, *more: Any, **options: Any) -> Any:
            if not self.full:
                return super().update(key, value, layer, *more, **options)
            kept = self.layers[layer]
            return torch.cat([kept.keys, key], -2), torch.cat([kept.values, value], -2)

    past = Past()
    with torch.no_grad():
        model(inputs_embeds=embedded, past_key_values=past, use_cache=True)
    past.full = True
    return past
