"""Tiny random models, given to `adapters.init`, and inputs for them."""

from collections.abc import Callable

import adapters
import torch
import transformers as tf
from torch import nn

VOCABULARY, BATCH, TOKENS, HIDDEN = 40, 4, 6, 32
UNFIT = "seq_bn[reduction_factor=4,ln_after=True]"  # a configuration that cannot run fused
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2}

CONFIGS: dict[str, Callable] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**_BERT)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**_BERT, pad_token_id=0)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=HIDDEN, hidden_dim=HIDDEN, n_layers=2, n_heads=2
        )
    ),
    "bart": lambda: tf.BartModel(
        tf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=HIDDEN,
            decoder_ffn_dim=HIDDEN,
            max_position_embeddings=16,
        )
    ),
    "gpt2": lambda: tf.GPT2Model(
        tf.GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=16)
    ),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**_LLAMA)),
    "t5": lambda: tf.T5Model(
        tf.T5Config(
            vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=16, d_ff=HIDDEN, num_layers=1, num_heads=2
        )
    ),
    "vit": lambda: tf.ViTModel(
        tf.ViTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=HIDDEN,
            image_size=8,
            patch_size=4,
        )
    ),
}

if hasattr(adapters, "AdapterModelInterface"):  # not in 1.1
    CONFIGS |= {
        # No model class of its own in the library: adapters sit in forward hooks.
        "qwen2-hooks": lambda: tf.Qwen2Model(tf.Qwen2Config(**_LLAMA)),
        # The same with a LayerNorm that the library looks up.
        "gemma2-hooks": lambda: tf.Gemma2Model(tf.Gemma2Config(**_LLAMA, head_dim=16)),
    }


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = CONFIGS[name]()
    adapters.init(model)
    return model.eval()


def inputs(name: str, device: str = "cpu", seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on every device
    if name == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator).to(device)}
    ids = torch.randint(1, VOCABULARY, (BATCH, TOKENS), generator=generator).to(device)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if name in ("bart", "t5") else {})}


@torch.no_grad()
def randomise_adapters(model: nn.Module, seed: int = 2) -> None:
    """Parameters of adapters drawn so large that every part of the maths shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ".adapters." in name and parameter.is_floating_point():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def bert(*configs: object, name: str = "bert") -> nn.Module:
    """A model with an adapter "a", "b", ... of each configuration, of which "a" is active."""
    model = build(name)
    for letter, config in zip("abcdefgh", configs or ("seq_bn[reduction_factor=4]",), strict=False):
        model.add_adapter(letter, config=config)
    randomise_adapters(model)
    model.set_active_adapters("a")
    return model


def run(model: nn.Module, name: str = "bert") -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(name))[0]
