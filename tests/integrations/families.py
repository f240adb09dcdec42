"""Families of models: a tiny one of each, its inputs, and where its adapters belong.

The names are those of transformers 4, with * for the numbers; `times` is how often each occurs.
"""

from typing import NamedTuple

import torch
import transformers as tf

VOCABULARY = 61
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {**SIZES, **TOKENS}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {**GROUPED, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 2}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
AUDIO = {
    **TEXT,
    "conv_dim": [16, 16],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SEQUENCES = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 16,
    "num_heads": 2,
    "num_layers": 2,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


class Family(NamedTuple):
    """Configuration and class of a model, names of its attention outputs and of its FFN outputs."""

    config: str
    model: str
    options: dict
    attention: str
    feed_forward: str
    inputs: str = "text"
    times: int = 2
    experts: bool = False


def bert(name, model="Model", inputs="text", options=TEXT, **more):
    layer = "encoder.layer.*."
    outputs = f"{layer}attention.output.dense", f"{layer}output.dense"
    return Family(f"{name}Config", f"{name}{model}", {**options, **more}, *outputs, inputs)


def llama(name, options=GROUPED, output="mlp.down_proj", config=None, **more):
    layer = "model.layers.*."
    outputs = f"{layer}self_attn.o_proj", output and f"{layer}{output}"
    config, model = f"{config or name}Config", f"{name}ForCausalLM"
    experts = options is EXPERTS
    return Family(config, model, {**options, **more}, *outputs, experts=experts)


def gpt(name, attention, output, options, layer="transformer.h.*."):
    outputs = f"{layer}{attention}", f"{layer}{output}"
    return Family(f"{name}Config", f"{name}ForCausalLM", options, *outputs)


def bart(name, model="ForConditionalGeneration", inputs="sequences", prefix="model.", **more):
    encoder, decoder = f"{prefix}encoder.layers.*.", f"{prefix}decoder.layers.*."
    attention = [encoder + "self_attn", decoder + "self_attn", decoder + "encoder_attn"]
    outputs = " ".join(f"{one}.out_proj" for one in attention), f"{encoder}fc2 {decoder}fc2"
    return Family(f"{name}Config", f"{name}{model}", {**SEQUENCES, **more}, *outputs, inputs)


def t5(name):
    encoder, decoder = "encoder.block.*.layer.*.", "decoder.block.*.layer.*."
    attention = [encoder + "SelfAttention", decoder + "SelfAttention", decoder + "EncDecAttention"]
    outputs = (
        " ".join(f"{one}.o" for one in attention),
        f"{encoder}DenseReluDense.wo {decoder}DenseReluDense.wo",
    )
    return Family(f"{name}Config", f"{name}ForConditionalGeneration", T5, *outputs, "sequences")


def audio(name, model="Model", prefix="", **more):
    layer = f"{prefix}encoder.layers.*."
    outputs = f"{layer}attention.out_proj", f"{layer}feed_forward.output_dense"
    return Family(f"{name}Config", f"{name}{model}", {**AUDIO, **more}, *outputs, "audio")


def vision(name, output="output.dense", **more):
    outputs = "encoder.layer.*.attention.output.dense", f"encoder.layer.*.{output}"
    return Family(f"{name}Config", f"{name}Model", {**IMAGE, **more}, *outputs, "image")


def two_towers(name, **more):
    towers = "text_model.encoder.layers.*.", "vision_model.encoder.layers.*."
    options = {"text_config": TEXT, "vision_config": IMAGE, **more}
    outputs = (
        " ".join(tower + end for tower in towers) for end in ("self_attn.out_proj", "mlp.fc2")
    )
    return Family(f"{name}Config", f"{name}Model", options, *outputs, "text and image")


def with_images(name, text, vision, **more):
    text_layer = "model.language_model.layers.*."
    vision_layer = "model.vision_tower.vision_model.encoder.layers.*."
    options = {"text_config": {**GROUPED, **text}, "vision_config": {**IMAGE, **vision}, **more}
    outputs = (
        f"{text_layer}self_attn.o_proj {vision_layer}self_attn.out_proj",
        f"{text_layer}mlp.down_proj {vision_layer}mlp.fc2",
    )
    model = f"{name}ForConditionalGeneration"
    return Family(f"{name}Config", model, options, *outputs, "image tokens")


POSITIONS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ALBERT = "encoder.albert_layer_groups.*.albert_layers.*."
DEEPSEEK = {
    "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 0, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "albert": Family(
        "AlbertConfig", "AlbertModel", {**TEXT, "embedding_size": 16},
        ALBERT + "attention.dense", ALBERT + "ffn_output", times=1,
    ),
    "arcee": llama("Arcee"),
    "audio-spectrogram-transformer": bert(
        "AST", inputs="spectrogram", options=SIZES, max_length=32, num_mel_bins=16
    ),
    "bart": bart("Bart"),
    "beit": vision("Beit"),
    "bert": bert("Bert"),
    "big_bird": bert("BigBird", attention_type="original_full"),
    "blenderbot": bart("Blenderbot"),
    "blenderbot-small": bart("BlenderbotSmall"),
    "bloom": gpt(
        "Bloom", "self_attention.dense", "mlp.dense_4h_to_h",
        {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY},
    ),
    "camembert": bert("Camembert"),
    "clip": two_towers("CLIP", projection_dim=16),
    "codegen": gpt("CodeGen", "attn.out_proj", "mlp.fc_out", {**GPT, "n_head": 4, "rotary_dim": 8}),
    "cohere": llama("Cohere"),
    "cohere2": llama("Cohere2"),
    "data2vec-audio": audio("Data2VecAudio"),
    "data2vec-text": bert("Data2VecText"),
    "data2vec-vision": vision("Data2VecVision"),
    "deberta": bert("Deberta", **POSITIONS),
    "deberta-v2": bert("DebertaV2", **POSITIONS),
    "deepseek_v3": llama("DeepseekV3", EXPERTS, "mlp.shared_experts.down_proj", **DEEPSEEK),
    "deit": vision("DeiT"),
    "dinov2": vision("Dinov2", "mlp.fc2", mlp_ratio=2),
    "dinov3_vit": Family(
        "DINOv3ViTConfig", "DINOv3ViTModel", IMAGE,
        "layer.*.attention.o_proj", "layer.*.mlp.down_proj", "image",
    ),
    "distilbert": Family(
        "DistilBertConfig", "DistilBertModel",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": VOCABULARY},
        "transformer.layer.*.attention.out_lin", "transformer.layer.*.ffn.lin2",
    ),
    "electra": bert("Electra", embedding_size=16),
    "ernie": bert("Ernie"),
    "esm": bert("Esm", mask_token_id=3),
    "falcon": gpt(
        "Falcon", "self_attention.dense", "mlp.dense_4h_to_h",
        {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "gemma": llama("Gemma"),
    "gemma2": llama("Gemma2"),
    "gemma3": with_images("Gemma3", {}, {}, mm_tokens_per_image=4, image_token_index=60),
    "gemma3_text": llama("Gemma3", config="Gemma3Text"),
    "glm": llama("Glm"),
    "glm4": llama("Glm4"),
    "gpt2": Family(
        "GPT2Config", "GPT2LMHeadModel", {**GPT, "add_cross_attention": True},
        "transformer.h.*.attn.c_proj transformer.h.*.crossattention.c_proj",
        "transformer.h.*.mlp.c_proj", "encoded",
    ),
    "gpt_bigcode": gpt("GPTBigCode", "attn.c_proj", "mlp.c_proj", GPT),
    "gpt_neo": gpt(
        "GPTNeo", "attn.attention.out_proj", "mlp.c_proj",
        {
            **TOKENS, "hidden_size": 32, "num_layers": 2, "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt_neox": gpt(
        "GPTNeoX", "attention.dense", "mlp.dense_4h_to_h", TEXT, "gpt_neox.layers.*."
    ),
    "gpt_oss": llama("GptOss", EXPERTS, "", num_local_experts=4),
    "gptj": gpt("GPTJ", "attn.out_proj", "mlp.fc_out", {**GPT, "rotary_dim": 8}),
    "granite": llama("Granite"),
    "helium": llama("Helium"),
    "hubert": audio("Hubert"),
    "layoutlm": bert("LayoutLM"),
    "llama": llama("Llama"),
    "llava": with_images(
        "Llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"},
        image_token_index=60, vision_feature_layer=-1,
    ),
    "longformer": bert("Longformer", attention_window=4),
    "m2m_100": bart("M2M100"),
    "marian": bart("Marian", "MTModel", decoder_vocab_size=VOCABULARY),
    "mbart": bart("MBart"),
    "ministral": llama("Ministral"),
    "mistral": llama("Mistral"),
    "mixtral": llama("Mixtral", EXPERTS, "", num_local_experts=4),
    "modernbert": Family(
        "ModernBertConfig", "ModernBertModel", {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
        "layers.*.attn.Wo", "layers.*.mlp.Wo",
    ),
    "mpnet": Family(
        "MPNetConfig", "MPNetModel", TEXT,
        "encoder.layer.*.attention.attn.o", "encoder.layer.*.output.dense",
    ),
    "mpt": gpt(
        "Mpt", "attn.out_proj", "ffn.down_proj",
        {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": VOCABULARY},
        "transformer.blocks.*.",
    ),
    "mt5": t5("MT5"),
    "nemotron": llama("Nemotron"),
    "olmo": llama("Olmo"),
    "olmo2": llama("Olmo2"),
    "openai-gpt": gpt("OpenAIGPT", "attn.c_proj", "mlp.c_proj", GPT)._replace(
        model="OpenAIGPTLMHeadModel"
    ),
    "opt": gpt(
        "OPT", "self_attn.out_proj", "fc2",
        {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 16}, "model.decoder.layers.*.",
    ),
    "pegasus": bart("Pegasus"),
    "persimmon": gpt(
        "Persimmon", "self_attn.dense", "mlp.dense_4h_to_h", TEXT, "model.layers.*."
    ),
    "phi": gpt("Phi", "self_attn.dense", "mlp.fc2", TEXT, "model.layers.*."),
    "phi3": llama("Phi3"),
    "plbart": bart("PLBart"),
    "qwen2": llama("Qwen2"),
    "qwen2_moe": llama(
        "Qwen2Moe", EXPERTS, "mlp.shared_expert.down_proj",
        num_experts=4, shared_expert_intermediate_size=48,
    ),
    "qwen3": llama("Qwen3"),
    "qwen3_moe": llama("Qwen3Moe", EXPERTS, "", num_experts=4),
    "rembert": bert("RemBert"),
    "roberta": bert("Roberta"),
    "roformer": bert("RoFormer", embedding_size=16),
    "sew": audio("SEW", squeeze_factor=1),
    "siglip": two_towers("Siglip"),
    "smollm3": llama("SmolLM3"),
    "stablelm": llama("StableLm"),
    "starcoder2": llama("Starcoder2", output="mlp.c_proj"),
    "t5": t5("T5"),
    "t5gemma": Family(
        "T5GemmaConfig", "T5GemmaForConditionalGeneration",
        {part: {**GROUPED, "model_type": "t5_gemma_module"} for part in ("encoder", "decoder")},
        "model.encoder.layers.*.self_attn.o_proj model.decoder.layers.*.self_attn.o_proj "
        "model.decoder.layers.*.cross_attn.o_proj",
        "model.encoder.layers.*.mlp.down_proj model.decoder.layers.*.mlp.down_proj", "sequences",
    ),
    "umt5": t5("UMT5"),
    "unispeech": audio("UniSpeech"),
    "vit": vision("ViT"),
    "wav2vec2": audio("Wav2Vec2", "ForCTC", "wav2vec2."),
    "whisper": bart(
        "Whisper", inputs="spectrogram sequences",
        num_mel_bins=8, max_source_positions=10, max_target_positions=20,
    ),
    "xlm-roberta": bert("XLMRoberta"),
    "xlm-roberta-xl": bert("XLMRobertaXL"),
}  # fmt: skip


def build(name):
    """A tiny random model of a family in evaluation mode, always the same."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    config = getattr(tf, family.config)(**family.options)
    model = getattr(tf, family.model)(config)
    for weight in model.parameters():
        if weight.dim() == 2 and not weight.any():  # Gemma 3's, through which images pass
            torch.nn.init.normal_(weight)
    return model.eval()


def inputs_of(name, size=3):
    """Keyword arguments for a forward of that model."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(size, *shape, generator=generator)

    ids = torch.randint(3, 59, (size, 7), generator=generator)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with_image = ids.clone()
    with_image[:, 1:5] = 60
    return {
        "text": text,
        "encoded": {**text, "encoder_hidden_states": normal(3, 32)},
        "sequences": {**text, "decoder_input_ids": ids[:, :5]},
        "image": {"pixel_values": normal(3, 16, 16)},
        "text and image": {**text, "pixel_values": normal(3, 16, 16)},
        "image tokens": {**text, "input_ids": with_image, "pixel_values": normal(3, 16, 16)},
        "audio": {"input_values": normal(400)},
        "spectrogram": {"input_values": normal(32, 16)},
        "spectrogram sequences": {"input_features": normal(8, 20), "decoder_input_ids": ids},
    }[FAMILIES[name].inputs]
