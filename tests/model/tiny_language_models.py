"""A tiny causal language model with random weights of (nearly) every family that transformers knows.

Configurations name the same quantity in many ways: one table gives the size for every name, a second one what
single families need besides, and `make_tiny` keeps what a family's configuration has a field for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, WIDTH = 4, 32

# Families that the tests of all families leave out, and why.
LEFT_OUT = {
    "cpmant": "reads a learned prompt before the text, so positions in its layers are not those of tokens",
    "gemma4_assistant": "a drafter without keys and values of its own: it uses those of another model",
    "gemma4_unified_assistant": "a drafter without keys and values of its own, as gemma4_assistant",
    "mllama": "skips its own cross-attention layers without an image of its own, and a bridge before them",
    "musicgen": "models four rows of audio codes at a time, not text",
    "musicgen_melody": "models four rows of audio codes at a time, not text",
    "prophetnet": "its layers read several streams of the text concatenated",
    "reformer": "its reversible layers run backward without hooks, so the bridge would get no gradient",
    "xlm": "has no decoder layers, only parallel lists of their parts",
    "xlnet": "permutes its text, and its layers read (tokens, samples, width)",
}
# The families of transformers 5.23. Those that a later release adds may need an entry in OVERRIDES first.
KNOWN = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "bamba",
    "bart",
    "beam",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "biogpt",
    "bitnet",
    "blenderbot",
    "blenderbot-small",
    "bloom",
    "blt",
    "camembert",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cohere_compass_text",
    "cpmant",
    "ctrl",
    "cwm",
    "data2vec-text",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "diffllama",
    "doge",
    "dots1",
    "dots3_note",
    "dots3_note_text",
    "electra",
    "emu3",
    "ernie",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "flint",
    "fuyu",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n",
    "gemma3n_text",
    "gemma4",
    "gemma4_assistant",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_assistant",
    "gemma4_unified_text",
    "git",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "got_ocr2",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "hyperclovax",
    "inkling2_text",
    "inkling_text",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama",
    "llama4",
    "llama4_text",
    "longcat_flash",
    "mamba",
    "mamba2",
    "marian",
    "mbart",
    "megatron-bert",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "mllama",
    "modernbert-decoder",
    "moshi",
    "moss_transcribe_diarize",
    "mpt",
    "musicgen",
    "musicgen_melody",
    "mvp",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "openai-gpt",
    "opt",
    "pegasus",
    "persimmon",
    "phi",
    "phi3",
    "phi4_multimodal",
    "phimoe",
    "plbart",
    "prophetnet",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp",
    "qwen4_exp_text",
    "recurrent_gemma",
    "reformer",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "rwkv",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xlstm",
    "xmod",
    "youtu",
    "zamba",
    "zamba2",
    "zaya",
]
FAMILIES = tuple(f for f in KNOWN if f in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and f not in LEFT_OUT)
NEWER = tuple(f for f in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if f not in KNOWN)


def _named(size: object, names: str) -> dict[str, object]:
    return dict.fromkeys(names.split(), size)


SIZES = {
    **_named(WIDTH, "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim"),
    **_named(WIDTH, "hidden_size_global out_hidden_size audio_embed_dim backbone_hidden_size"),
    **_named(LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    **_named(LAYERS, "encoder_layers num_encoder_layers"),  # their caches count the encoder's layers
    **_named(4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    **_named(4, "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    **_named(2, "num_key_value_heads"),
    **_named(8, "head_dim rotary_dim"),
    **_named(48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff dim_ff"),
    **_named(48, "ffn_hidden_size"),
    # mixtures of experts
    **_named(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk"),
    **_named(1, "n_shared_experts n_group topk_group num_expert_group"),
    **_named(16, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size"),
    **_named(16, "shared_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size"),
    # latent and indexed attention
    **_named(16, "q_lora_rank kv_lora_rank index_head_dim"),
    **_named(8, "qk_rope_head_dim qk_nope_head_dim v_head_dim"),
    **_named(2, "index_n_heads"),
    **_named(64, "index_topk"),
    # linear attention and state spaces
    **_named(2, "linear_num_key_heads linear_num_value_heads"),
    **_named(8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **_named(4, "linear_num_heads"),
    **_named(8, "mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size chunk_size state_size"),
    # tables of embeddings
    **_named(8, "hidden_size_per_layer_input laurel_rank"),
    **_named(16, "pronunciation_embed_dim shape_embed_dim input_embedding_size output_embedding_size"),
    **_named(64, "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab audio_vocab_size"),
    **_named(128, "max_position_embeddings n_positions"),
    # windows, and the towers of models that have eyes or ears of their own
    **_named(16, "sliding_window window_size image_size"),
    **_named(8, "patch_size"),
    **_named(2, "depth num_codebooks"),
    **_named(64, "num_position_embeddings"),
    # special tokens
    **_named(0, "pad_token_id"),
    **_named(1, "bos_token_id decoder_start_token_id"),
    **_named(2, "eos_token_id"),
}

ALTERNATING = ["linear_attention", "full_attention"] * 2
DENSE_THEN_SPARSE = ["dense", "sparse", "sparse", "sparse"]
AS_DECODER = {"is_decoder": True}

# What single configurations (also those inside others) need besides, by model type.
OVERRIDES: dict[str, dict] = {
    **_named(
        AS_DECODER,
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl",
    ),
    "bailing_hybrid": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_THEN_SPARSE},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"use_cache": False},  # its cache asks the configuration for a layer count that it does not have
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_audio_encoder": _named(WIDTH, "adapter_input_size adapter_out_dim"),
    "dots3_note_text": {
        "num_key_value_heads": 4,
        **_named(4, "swa_num_attention_heads swa_num_key_value_heads"),
        **_named(16, "swa_q_lora_rank swa_kv_lora_rank swa_head_dim"),
        **_named(8, "swa_qk_nope_head_dim swa_qk_rope_head_dim swa_v_head_dim"),
    },
    "dots3_note_vision_encoder": {
        **_named(WIDTH, "adapter_in_dim adapter_out_dim"),
        "mlp_layer_types": ["dense"] * LAYERS,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_vision": {"architecture": "resnet10t"},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ALTERNATING},
    "hrm_text": {"num_hidden_layers": 8, "H_cycles": 2, "L_cycles": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_THEN_SPARSE},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"head_dim": 8, "num_heads": 8, "n_groups": 2},
    "phi4_multimodal_audio": {
        **_named(WIDTH, "ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels"),
        "num_blocks": 1,
        "input_size": 16,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        **_named(8, "hc_lowrank indexer_head_dim indexer_budget"),
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
    },
    "xlstm": {"hidden_size": 64, "num_heads": 2, "qk_dim_factor": 1.0, "ffn_round_up_to_multiple_of": 16},
    "xmod": {**AS_DECODER, "default_language": "en_XX"},
    "zamba": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def make_tiny(family: str, seed: int = 0, vocab_size: int = 128) -> PreTrainedModel:
    """A causal language model of `family` in eval mode, a few hundred thousand parameters at most."""
    config = tiny_config(CONFIG_MAPPING[family], vocab_size)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_config(config_class: type[PreTrainedConfig], vocab_size: int) -> PreTrainedConfig:
    fields = {field.name for field in dataclasses.fields(config_class)}
    sizes = {**SIZES, **_named(vocab_size, "vocab_size vocab_size_per_layer_input unpadded_vocab_size")}
    chosen = {name: size for name, size in sizes.items() if name in fields}
    if "qk_rope_head_dim" in fields:  # latent attention: widths of heads follow from their parts
        chosen.pop("head_dim", None)
        chosen["num_key_value_heads"] = 4
    for name, spec in _parts(config_class).items():
        optional = isinstance(spec, SubConfigSpec) and spec.optional
        chosen[name] = None if optional else tiny_config(_class_of(spec), vocab_size)
    return config_class(**{**chosen, **OVERRIDES.get(config_class.model_type, {})})


def _parts(config_class: type[PreTrainedConfig]) -> Mapping[str, object]:
    return getattr(config_class, "sub_configs_defaults", None) or {}


def _class_of(spec: object) -> type[PreTrainedConfig]:
    if not isinstance(spec, SubConfigSpec):
        return spec
    return spec.get_config_class(spec.model_type) if spec.config_class is AutoConfig else spec.config_class
