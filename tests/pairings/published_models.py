"""Released language models of today: configuration, special tokens, chat template and where each comes from.

`docs/models.md` says why each is in the list, and under which licence its template is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import AutoConfig, AutoModelForCausalLM

from .published_tokenizers import PublishedTokenizer, write_tokenizer

RECORDED = Path(__file__).parent / "templates"  # its README.md names sources and licences
IN_TRL = Path(trl.__file__).parent / "chat_templates"  # read where TRL installs them

# Sizes of the tiny models. Heads are wider than width / heads, as in Qwen3 and Gemma 3.
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
LINE_BREAKS = tuple("\n" * count for count in range(1, 5))  # tokens of their own in Gemma


@dataclass(frozen=True)
class PublishedModel:
    """A released language model in small.

    name: on the Hub. template: a file in `RECORDED` or `IN_TRL`. stops: what ends an answer according to its
    generation_config.json. answer: the text in the loss for an answer, last: for the last answer, if that
    differs. earlier: for an answer before the last one, if the template drops its reasoning. config: what its
    config.json has besides the sizes. has_system: whether the template accepts a system message.
    """

    name: str
    model_type: str
    template: Path
    tokenizer: PublishedTokenizer
    stops: tuple[str, ...]
    answer: str
    config: dict[str, Any] = field(default_factory=dict)
    last: str | None = None
    earlier: str | None = None
    has_system: bool = True

    def __str__(self) -> str:
        return self.name.partition("/")[2]


QWEN_TOKENS = PublishedTokenizer(
    "byte_level", "Qwen2Tokenizer", eos="<|im_end|>", pad="<|endoftext|>", added=(*CHATML, *THINK),
    not_special=THINK, options={"add_bos_token": False, "add_prefix_space": False},
)  # fmt: skip
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

QWEN3_4B = {"head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1e6, "max_window_layers": 36}

MODELS = (
    PublishedModel(
        "Qwen/Qwen3-4B",
        "qwen3",
        IN_TRL / "qwen3.jinja",
        QWEN_TOKENS,
        stops=("<|im_end|>", "<|endoftext|>"),
        answer="{}<|im_end|>",
        config=QWEN3_4B,
        earlier="{}<|im_end|>",
    ),
    PublishedModel(
        "Qwen/Qwen3-4B-Instruct-2507",
        "qwen3",
        IN_TRL / "qwen3_instruct_2507.jinja",
        QWEN_TOKENS,
        stops=("<|im_end|>", "<|endoftext|>"),
        answer="{}<|im_end|>",
        config=QWEN3_4B | {"rope_theta": 5e6},
    ),
    PublishedModel(
        "Qwen/Qwen2.5-7B-Instruct",
        "qwen2",
        IN_TRL / "qwen2_5.jinja",
        PublishedTokenizer(
            "byte_level", "Qwen2Tokenizer", eos="<|im_end|>", pad="<|endoftext|>", added=CHATML,
            options={"add_bos_token": False, "add_prefix_space": False},
        ),
        stops=("<|im_end|>", "<|endoftext|>"),
        answer="{}<|im_end|>",
        config={"tie_word_embeddings": False, "rope_theta": 1e6, "use_sliding_window": False},
    ),
    PublishedModel(
        "meta-llama/Llama-3.2-3B-Instruct",
        "llama",
        IN_TRL / "llama3_2.jinja",
        PublishedTokenizer(
            "byte_level", "PreTrainedTokenizerFast", bos="<|begin_of_text|>", eos="<|eot_id|>",
            added=(
                "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eom_id|>", "<|eot_id|>",
            ),
            adds_bos=True,
        ),
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        answer="{}<|eot_id|>",
        config={
            "tie_word_embeddings": True, "head_dim": 8,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
            },
        },
    ),
    PublishedModel(
        "google/gemma-3-1b-it",
        "gemma3_text",
        IN_TRL / "gemma3.jinja",
        PublishedTokenizer(
            "gemma", "GemmaTokenizer", bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>",
            added=(
                "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *LINE_BREAKS,
            ),
            not_special=LINE_BREAKS, adds_bos=True, options={"add_bos_token": True, "add_eos_token": False},
        ),
        stops=("<eos>", "<end_of_turn>"),
        answer="{}<end_of_turn>",
        config={
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    ),
    PublishedModel(
        "google/gemma-4-E2B-it",
        "gemma4_text",
        IN_TRL / "gemma4_v5.jinja",
        PublishedTokenizer(
            "gemma", "GemmaTokenizer", bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>",
            added=(
                "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>",
                "<|think|>", *LINE_BREAKS,
            ),
            not_special=LINE_BREAKS, adds_bos=True, options={"add_bos_token": True, "add_eos_token": False},
        ),
        stops=("<eos>", "<turn|>"),
        answer="{}<turn|>",
        config={
            "head_dim": 16, "global_head_dim": 16, "sliding_window": 16, "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2
            + ["full_attention"],
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 3, "num_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
        },
    ),
    PublishedModel(
        "mistralai/Mistral-7B-Instruct-v0.1",
        "mistral",
        RECORDED / "mistral_7b.jinja",
        PublishedTokenizer(
            "sentencepiece", "LlamaTokenizer", bos="<s>", eos="</s>", unk="<unk>",
            added=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
            adds_bos=True, options={"add_bos_token": True, "add_eos_token": False, "legacy": False},
        ),
        stops=("</s>",),
        answer="{}</s>",
        config={"tie_word_embeddings": False, "sliding_window": 16, "head_dim": 8, "rope_theta": 1e4},
        has_system=False,
    ),
    PublishedModel(
        "microsoft/Phi-4-mini-instruct",
        "phi3",
        RECORDED / "phi4_mini.jinja",
        PublishedTokenizer(
            "byte_level", "GPT2Tokenizer", bos="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>",
            unk="<|endoftext|>",
            added=("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"),
            options={"add_bos_token": False, "add_eos_token": False, "add_prefix_space": False},
        ),
        stops=("<|end|>", "<|endoftext|>"),
        answer="{}<|end|>",
        last="{}<|end|><|endoftext|>",
        config={
            "tie_word_embeddings": True, "sliding_window": 262144, "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                "short_factor": [1.0] * 3, "long_factor": [1.0, 1.2, 2.0],
                "original_max_position_embeddings": 256,
            },
        },
    ),
    PublishedModel(
        "HuggingFaceTB/SmolLM3-3B",
        "smollm3",
        RECORDED / "smollm3.jinja",
        PublishedTokenizer(
            "byte_level", "PreTrainedTokenizerFast", bos="<|begin_of_text|>", eos="<|im_end|>",
            pad="<|im_end|>",
            added=("<|begin_of_text|>", "<|end_of_text|>", *THINK, "<|im_start|>", "<|im_end|>"),
            not_special=THINK,
        ),
        stops=("<|im_end|>",),
        answer="{}<|im_end|>",
        config={"tie_word_embeddings": True, "no_rope_layer_interval": 4, "rope_theta": 5e6},
    ),
    PublishedModel(
        "allenai/OLMo-2-1124-7B-Instruct",
        "olmo2",
        RECORDED / "olmo2.jinja",
        PublishedTokenizer(
            "byte_level", "GPT2Tokenizer", bos="<|endoftext|>", eos="<|endoftext|>", pad="<|pad|>",
            unk="<|endoftext|>", added=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"),
            options={"add_prefix_space": False},
        ),
        stops=("<|endoftext|>",),
        answer="{}<|endoftext|>",
        config={"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_theta": 5e5},
    ),
    PublishedModel(
        "ibm-granite/granite-4.0-h-tiny",
        "granitemoehybrid",
        RECORDED / "granite4.jinja",
        PublishedTokenizer(
            "byte_level", "GPT2Tokenizer", bos="<|end_of_text|>", eos="<|end_of_text|>", pad="<|pad|>",
            unk="<|unk|>",
            added=("<|pad|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|unk|>"),
            options={"add_bos_token": False, "add_prefix_space": False},
        ),
        stops=("<|end_of_text|>",),
        answer="{}<|end_of_text|>",
        config={
            "tie_word_embeddings": True, "position_embedding_type": "nope",
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16,
            "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
            "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
        },
    ),
    PublishedModel(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "qwen2",
        IN_TRL / "deepseek_r1_distill.jinja",
        PublishedTokenizer(
            "byte_level", "LlamaTokenizerFast", bos=BEGIN, eos=END, pad=END,
            added=(END, "<｜User｜>", "<｜Assistant｜>", BEGIN, *THINK),
            not_special=("<｜User｜>", "<｜Assistant｜>", *THINK),
            adds_bos=True, options={"add_bos_token": True, "add_eos_token": False, "legacy": True},
        ),
        stops=(END,),
        answer="{}" + END,
        earlier="\n\n{}" + END,
        config={"tie_word_embeddings": False, "rope_theta": 1e4, "use_sliding_window": False},
    ),
    PublishedModel(
        "LiquidAI/LFM2-2.6B",
        "lfm2",
        IN_TRL / "lfm2_v2.jinja",
        PublishedTokenizer(
            "byte_level", "PreTrainedTokenizerFast", bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>",
            added=("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            adds_bos=True,
        ),
        stops=("<|im_end|>",),
        answer="{}<|im_end|>",
        config={
            "layer_types": ["conv", "conv", "full_attention", "conv"], "tie_word_embeddings": True,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    PublishedModel(
        "Qwen/Qwen3.5-4B",
        "qwen3_5_text",
        IN_TRL / "qwen3_5_think.jinja",
        QWEN_TOKENS,
        stops=("<|im_end|>", "<|endoftext|>"),
        answer="{}<|im_end|>",
        config={
            "layer_types": ["linear_attention"] * 3 + ["full_attention"], "tie_word_embeddings": True,
            "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        earlier="{}<|im_end|>",
    ),
)  # fmt: skip


def write_model(folder: Path, model: PublishedModel, seed: int = 0) -> Path:
    """Write a tiny random model with the files of a Hub repository."""
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder, model.tokenizer, model.template.read_text(encoding="utf-8"))
    tokens = {role: getattr(model.tokenizer, role) for role in ("bos", "eos", "pad")}
    ids = {f"{role}_token_id": token and tokenizer.token_to_id(token) for role, token in tokens.items()}
    # Released vocabularies are padded: the matrix has rows that no token uses.
    rows = 64 * (tokenizer.get_vocab_size() // 64 + 2)
    sizes = {**SIZES, "vocab_size": rows}
    if "hidden_size_per_layer_input" in model.config:
        sizes["vocab_size_per_layer_input"] = rows
    config = AutoConfig.for_model(model.model_type, **{**sizes, **ids, **model.config})
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config)
    lm.generation_config.eos_token_id = [tokenizer.token_to_id(stop) for stop in model.stops]
    lm.save_pretrained(folder)
    return folder
