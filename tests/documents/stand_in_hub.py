"""Tiny random models in a cache folder of the hub, under the names that the pages load.

Nothing of transformers is replaced: `from_pretrained` finds the files in the cache and reads them.
"""

import fnmatch
import re

import torch
from snippets import snippets_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4}
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2}
# pattern of names -> configuration class, model class, options
MODELS = {
    "answerdotai/ModernBERT-*": ("ModernBertConfig", "ModernBertForMaskedLM", SIZES),
    "sentence-transformers/all-MiniLM-*": ("BertConfig", "BertModel", SIZES),
    "*roberta-base": ("RobertaConfig", "RobertaForMaskedLM", SIZES),
    "*distilbert-base-*": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    ),
    "*bert-base-*": ("BertConfig", "BertForMaskedLM", SIZES),
    "Qwen/Qwen3-*": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "meta-llama/Llama-*": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "*gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "*t5-small": ("T5Config", "T5ForConditionalGeneration", T5),
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
REVISION = "0" * 40


def names_on(page):
    """The names of models that the page's code loads, by what each is made of."""
    code = "\n".join(snippet.code for snippet in snippets_of(page, "python"))
    found = {}
    for name in sorted(set(re.findall(r'"([\w.-]+(?:/[\w.-]+)?)"', code))):
        kind = next((made for to, made in MODELS.items() if fnmatch.fnmatch(name, to)), None)
        if kind is not None:
            found[name] = kind
    return found


def tokenizer():
    """Bytes are the vocabulary, so that any text has tokens and comes back."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*SPECIAL, *alphabet])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        chat_template="{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
    )


def fill(cache, names):
    """Save a model and a tokenizer for each name as the hub's client would have stored them."""
    import transformers

    words = tokenizer()
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    special = {**ids, "cls_token_id": 2, "sep_token_id": 3, "decoder_start_token_id": 0}
    for name, (config, model, options) in names.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        torch.manual_seed(0)
        settings = getattr(transformers, config)(vocab_size=len(words), **options, **special)
        snapshot = folder / "snapshots" / REVISION
        getattr(transformers, model)(settings).save_pretrained(snapshot)
        words.save_pretrained(snapshot)


def use(cache, monkeypatch):
    """Let the hub's client look into `cache` alone, and never on the network."""
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    # transformers 4 has read both when it was imported
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", True, raising=False)
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(cache), raising=False)
