"""The backbones of both Flamingos: a tiny CLIP and tiny language models with deterministic weights."""

from __future__ import annotations

from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.golden.deterministic_weights import fill

VOCABULARY = 128
MEDIA_TOKEN = 127
EOC_TOKEN = 126
PAD_TOKEN = 0
WIDTH = 32
LAYERS = 4
IMAGE_SIZE = 12

_SHARED = {"vocab_size": VOCABULARY, "pad_token_id": PAD_TOKEN, "bos_token_id": 1, "eos_token_id": EOC_TOKEN}
_HIDDEN = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, **_SHARED}
_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, **_SHARED}

# OpenFlamingo's name for the list of decoder layers, and a configuration small enough to run in milliseconds.
# No dropout anywhere, so that training mode is reproducible too.
DECODER_LAYERS = {
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
    "gptj": "transformer.h",
    "gpt_neo": "transformer.h",
}
FAMILIES = tuple(DECODER_LAYERS)


def language_config(family: str) -> PretrainedConfig:
    """Return the tiny configuration of one of FAMILIES, with its own kind of positions and attention."""
    makers = {
        "opt": lambda: OPTConfig(
            ffn_dim=64, word_embed_proj_dim=WIDTH, max_position_embeddings=64, dropout=0.0, **_HIDDEN
        ),
        "llama": lambda: LlamaConfig(
            intermediate_size=64,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            **_HIDDEN,
        ),
        "gpt_neox": lambda: GPTNeoXConfig(
            intermediate_size=64, max_position_embeddings=64, tie_word_embeddings=False, **_HIDDEN
        ),
        "mpt": lambda: MptConfig(d_model=WIDTH, n_heads=4, n_layers=LAYERS, max_seq_len=64, **_SHARED),
        "gptj": lambda: GPTJConfig(
            rotary_dim=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=False, **_GPT
        ),
        "gpt_neo": lambda: GPTNeoConfig(
            hidden_size=WIDTH,
            num_layers=LAYERS,
            attention_types=[[["global", "local"], LAYERS // 2]],
            num_heads=4,
            window_size=6,
            max_position_embeddings=64,
            attention_dropout=0.0,
            embed_dropout=0.0,
            resid_dropout=0.0,
            **_SHARED,
        ),
    }
    return makers[family]()


def tiny_language_model(family: str) -> PreTrainedModel:
    """Return a causal LM in float32 with deterministic weights."""
    model = AutoModelForCausalLM.from_config(language_config(family))
    model = model.float().eval()
    fill(model, "lang_encoder.")
    return model


def tiny_clip() -> nn.Module:
    """Return an OpenCLIP model with a ViT tower: 3 x 3 patches of 4 pixels, width 32."""
    vision = CLIPVisionCfg(layers=2, width=WIDTH, head_width=16, patch_size=4, image_size=IMAGE_SIZE)
    text = CLIPTextCfg(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    clip = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).float().eval()
    fill(clip.visual, "vision_encoder.")
    return clip
