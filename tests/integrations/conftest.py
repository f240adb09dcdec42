"""Tiny random models, and inputs for them."""

import pytest
import torch

pytest.importorskip("peft", reason="the PEFT plug-in needs peft")
pytest.importorskip("transformers", reason="the PEFT plug-in needs transformers")

import huggingface_hub.constants
import peft
import transformers as tf
from mixed_models import randomised

from adapterkern.grouped import functional
from adapterkern.integrations.peft import BottleneckConfig, grouped

VOCABULARY = 61
LAYERS = 2


def _llama_like(config: str, model: str, hidden_size: int, layers: int, **options):
    settings = getattr(tf, config)(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=hidden_size // 2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return getattr(tf, model)(settings)


def _bert_like(config: str, model: str, hidden_size: int, layers: int, **options):
    settings = getattr(tf, config)(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        **options,
    )
    return getattr(tf, model)(settings)


def _gpt2(hidden_size: int, layers: int, **options):
    settings = tf.GPT2Config(
        n_embd=hidden_size,
        n_layer=layers,
        n_head=2,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return tf.GPT2LMHeadModel(settings)


def _distilbert(hidden_size: int, layers: int):
    settings = tf.DistilBertConfig(
        dim=hidden_size,
        hidden_dim=2 * hidden_size,
        n_layers=layers,
        n_heads=2,
        vocab_size=VOCABULARY,
    )
    return tf.DistilBertModel(settings)


def _opt(hidden_size: int, layers: int):
    settings = tf.OPTConfig(
        hidden_size=hidden_size,
        ffn_dim=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        word_embed_proj_dim=hidden_size // 2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.OPTForCausalLM(settings)


def _t5(hidden_size: int, layers: int):
    settings = tf.T5Config(
        d_model=hidden_size,
        d_ff=2 * hidden_size,
        d_kv=hidden_size // 2,
        num_heads=2,
        num_layers=layers,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return tf.T5ForConditionalGeneration(settings)


_BUILDERS = {
    "bert": lambda *a: _bert_like("BertConfig", "BertModel", *a, vocab_size=VOCABULARY),
    "bert-classifier": lambda *a: _bert_like(
        "BertConfig", "BertForSequenceClassification", *a, vocab_size=VOCABULARY
    ),
    "roberta": lambda *a: _bert_like("RobertaConfig", "RobertaModel", *a, vocab_size=VOCABULARY),
    "roberta-classifier": lambda *a: _bert_like(
        "RobertaConfig", "RobertaForSequenceClassification", *a, vocab_size=VOCABULARY
    ),
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "gpt2-cross": lambda *a: _gpt2(*a, add_cross_attention=True),
    "opt": _opt,
    "llama": lambda *a: _llama_like("LlamaConfig", "LlamaForCausalLM", *a),
    "mistral": lambda *a: _llama_like("MistralConfig", "MistralForCausalLM", *a),
    "qwen2": lambda *a: _llama_like("Qwen2Config", "Qwen2ForCausalLM", *a),
    "gemma": lambda *a: _llama_like("GemmaConfig", "GemmaForCausalLM", *a),
    "t5": _t5,
    "vit": lambda *a: _bert_like("ViTConfig", "ViTModel", *a, image_size=16, patch_size=8),
}


@pytest.fixture(autouse=True)
def _without_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def tiny():
    """tiny(name, hidden_size=32, layers=2): a random model in evaluation mode, always the same."""

    def build(name: str, hidden_size: int = 32, layers: int = LAYERS):
        torch.manual_seed(0)
        return _BUILDERS[name](hidden_size, layers).eval()

    return build


@pytest.fixture
def batch():
    """batch(name, size=4): keyword arguments for a forward of that tiny model."""

    def build(name: str, size: int = 4):
        generator = torch.Generator().manual_seed(1)
        if name == "vit":
            return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}
        ids = torch.randint(3, VOCABULARY, (size, 7), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "t5":
            inputs["decoder_input_ids"] = ids[:, :5]
        if name == "gpt2-cross":
            inputs["encoder_hidden_states"] = torch.randn(size, 3, 32, generator=generator)
        return inputs

    return build


@pytest.fixture
def output():
    """output(model, inputs): the model's first result, without gradients."""

    def run(model, inputs, **options):
        with torch.no_grad():
            return model(**inputs, **options)[0]

    return run


@pytest.fixture
def mixed(tiny):
    """mixed(name, **fields): a model with "french", and the narrower "legal" and "unused"."""

    def build(name, **fields):
        model = peft.get_peft_model(tiny(name), BottleneckConfig(**fields), "french")
        for other in ("legal", "unused"):
            model.add_adapter(other, BottleneckConfig(bottleneck_size=5, **fields))
        model.set_requires_grad(["french", "legal", "unused"])
        return randomised(model).eval()

    return build


@pytest.fixture
def ran(monkeypatch):
    """The grouped calls that have run."""
    calls, run_call = [], functional.run_call

    def counted(call, *args):
        calls.append(call)
        return run_call(call, *args)

    monkeypatch.setattr(functional, "run_call", counted)
    return calls


@pytest.fixture
def looped(monkeypatch):
    """looped(function): its result where every adapter runs apart, on its own inputs."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(grouped, "_reason_of", lambda adapter: "a test asks for it")
            return function()

    return run
