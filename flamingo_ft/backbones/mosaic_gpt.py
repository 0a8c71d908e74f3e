"""MosaicGPT, the architecture of MPT-1B (mpt-1b-redpajama-200b), without remote code from the Hub.

It is MPT with layer norms over all heads of the queries and of the keys (arXiv:2302.05442, section 2.1), and
other names for the same modules. What it shares with transformers' MPT is inherited, including the forward
around the blocks.

Shapes: B samples, T text tokens, S tokens in the cache and in the input, H heads, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GradientCheckpointingLayer,
    MptForCausalLM,
    MptModel,
    MptPreTrainedModel,
    PreTrainedConfig,
)

# Keys of its configuration for which only this value is implemented.
FIXED = {
    "alibi": True,
    "attn_qk_ln": True,
    "no_bias": True,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
    "attn_clip_qkv": None,
    "softmax_scale": None,
    "logit_scale": None,
    "embedding_fraction": 1.0,
    "attn_pdrop": 0,
    "resid_pdrop": 0,
    "emb_pdrop": 0,
}


@strict
class MosaicGptConfig(PreTrainedConfig):
    r"""Configuration of `MosaicGptForCausalLM`. Keys about its training are kept and not used.

    Args:
        d_model: D.
        n_heads: H.
        n_layers: number of decoder layers.
        mlp_ratio: width of the feed-forward layer, as a multiple of D.
        max_seq_len: context length in tokens.
        vocab_size: rows of the embedding matrix, which is tied to the output head.
        alibi_bias_max: the ALiBi slope of the last head is 2 ** -alibi_bias_max.
        layer_norm_epsilon: of every layer norm.
        init_std: standard deviation of initial weights.
    """

    model_type = "mosaic_gpt"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "initializer_range": "init_std",
    }

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    mlp_ratio: int = 4
    max_seq_len: int = 2048
    vocab_size: int = 50432
    alibi_bias_max: int = 8
    layer_norm_epsilon: float = 1e-5
    init_std: float = 0.02
    use_cache: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key, value in FIXED.items():
            if kwargs.setdefault(key, value) != value:
                raise ValueError(f"{key}: a mosaic_gpt model supports only {value}, got {kwargs[key]}")
        super().__post_init__(**kwargs)


class MosaicGptAttention(nn.Module):
    """Causal self-attention with queries and keys normalized over all heads at once."""

    def __init__(self, config: MosaicGptConfig, layer_index: int):
        super().__init__()
        width = config.d_model
        self.heads = config.n_heads
        self.layer_index = layer_index
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.q_ln = _layer_norm(config)
        self.k_ln = _layer_norm(config)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, hidden_states: Tensor, position_bias: Tensor, attention_mask: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, T, D) -> (B, T, D) and the attention weights (B, H, T, S).

        position_bias: (H, 1, max_seq_len). attention_mask: (B, 1, T, S), True where attention is blocked.
        """
        query, key, value = self.Wqkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (
            part.to(value.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_ln(query), self.k_ln(key), value)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        scores = (
            query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + position_bias[..., -key.shape[-2] :]
        )
        # In float32 at least, like the bias. Padding attends to nothing: a finite minimum keeps NaN out of
        # its softmax.
        scores = scores.masked_fill(attention_mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(value.dtype)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(-2)), weights


class MosaicGptMlp(nn.Module):
    """Feed-forward layer."""

    def __init__(self, config: MosaicGptConfig):
        super().__init__()
        self.mlp_up = nn.Linear(config.d_model, config.mlp_ratio * config.d_model, bias=False)
        self.mlp_down = nn.Linear(config.mlp_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mlp_down(F.gelu(self.mlp_up(hidden_states)))


class MosaicGptBlock(GradientCheckpointingLayer):
    """Decoder layer with the signature of MPT's."""

    def __init__(self, config: MosaicGptConfig, layer_index: int):
        super().__init__()
        self.ln_1 = _layer_norm(config)
        self.attn = MosaicGptAttention(config, layer_index)
        self.ln_2 = _layer_norm(config)
        self.mlp = MosaicGptMlp(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        update, weights = self.attn(self.ln_1(hidden_states), position_bias, attention_mask, layer_past)
        hidden_states = hidden_states + update
        return hidden_states + self.mlp(self.ln_2(hidden_states)), weights


class MosaicGptPreTrainedModel(MptPreTrainedModel):
    config_class = MosaicGptConfig
    # transformers reads it when it places a model on several devices: a block must stay on one of them.
    _no_split_modules = ["MosaicGptBlock"]


class MosaicGptModel(MosaicGptPreTrainedModel, MptModel):
    """Embeddings, decoder layers and final layer norm. The forward is MPT's, which uses MPT's names."""

    def __init__(self, config: MosaicGptConfig):
        MptPreTrainedModel.__init__(self, config)  # MptModel's would build MPT's layers
        self.num_heads = config.n_heads
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(MosaicGptBlock(config, index) for index in range(config.n_layers))
        self.ln_f = _layer_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def norm_f(self) -> nn.LayerNorm:  # pyrefly: ignore[bad-override]
        return self.ln_f

    def build_mpt_alibi_tensor(
        self,
        num_heads: int,
        sequence_length: int,
        alibi_bias_max: int = 8,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return the ALiBi bias (arXiv:2108.12409) of each key position: (H, 1, sequence_length), float32.

        The slopes of the heads are a geometric sequence for any number of heads.
        """
        positions = torch.arange(1 - sequence_length, 1, device=device, dtype=torch.float32)
        heads = torch.arange(1, num_heads + 1, device=device, dtype=torch.float32)
        slopes = 2.0 ** (-heads * self.config.alibi_bias_max / num_heads)
        return slopes[:, None, None] * positions


class MosaicGptForCausalLM(MosaicGptPreTrainedModel, MptForCausalLM):
    """The model with its output head, which is tied to the embeddings."""

    def __init__(self, config: MosaicGptConfig):
        MptPreTrainedModel.__init__(self, config)
        self.transformer = MosaicGptModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()


def _layer_norm(config: MosaicGptConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=False)


def register_mosaic_gpt() -> None:
    """Register the architecture with transformers' Auto classes."""
    AutoConfig.register(MosaicGptConfig.model_type, MosaicGptConfig, exist_ok=True)
    AutoModelForCausalLM.register(MosaicGptConfig, MosaicGptForCausalLM, exist_ok=True)
