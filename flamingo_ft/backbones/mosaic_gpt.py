"""MosaicGPT, the architecture of MPT-1B (mpt-1b-redpajama-200b), which transformers has only through code on the Hub.

It is MPT with layer norms on all queries and all keys of an attention (arXiv:2302.05442, section 2.1) and names of its
own for the same parts. What it shares with transformers' MPT, the forward around the blocks included, is taken from
there.

Shapes: B samples, T text tokens, S tokens in the cache and these, H heads, D hidden width.
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
    MptForCausalLM,
    MptModel,
    MptPreTrainedModel,
    PreTrainedConfig,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

# Keys of its configuration that these files are not written for any other value of.
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
    r"""Configuration of `MosaicGptForCausalLM`; keys that only tell how the model was trained are kept and not used.

    Args:
        d_model: D.
        n_heads: H.
        n_layers: number of decoder layers.
        mlp_ratio: width of the feed-forward layer, as a multiple of D.
        max_seq_len: longest text in tokens.
        vocab_size: rows of the embedding matrix, which is the output head's too.
        alibi_bias_max: the slope of the last head is 2 to the power of minus this.
        layer_norm_epsilon: of every layer norm.
        init_std: of new weights.
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
        for key, wanted in FIXED.items():
            if kwargs.setdefault(key, wanted) != wanted:
                raise ValueError(f"a mosaic_gpt model with {key} {kwargs[key]}; only {wanted} is known here")
        super().__post_init__(**kwargs)


class MosaicGptAttention(nn.Module):
    """Causal self-attention, queries and keys normalised over all heads at once."""

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
        """hidden_states (B, T, D), position_bias (H, 1, max_seq_len), attention_mask (B, 1, T, S) true where nothing
        may be seen -> (B, T, D) and the attention's weights (B, H, T, S)."""
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
        # In float32 at least, as the bias is. Padding sees nothing: finite numbers keep its softmax from being none.
        scores = scores.masked_fill(attention_mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(value.dtype)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(-2)), weights


class MosaicGptMlp(nn.Module):
    """The feed-forward layer."""

    def __init__(self, config: MosaicGptConfig):
        super().__init__()
        self.mlp_up = nn.Linear(config.d_model, config.mlp_ratio * config.d_model, bias=False)
        self.mlp_down = nn.Linear(config.mlp_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mlp_down(F.gelu(self.mlp_up(hidden_states)))


class MosaicGptBlock(GradientCheckpointingLayer):
    """A decoder layer, called as MPT's are."""

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
    _no_split_modules = ["MosaicGptBlock"]


class MosaicGptModel(MosaicGptPreTrainedModel, MptModel):
    """Embeddings, decoder layers and the last layer norm; MPT's forward, which asks for them by MPT's names."""

    def __init__(self, config: MosaicGptConfig):
        MptPreTrainedModel.__init__(self, config)  # not MptModel's, which would make MPT's layers
        self.num_heads = config.n_heads
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(MosaicGptBlock(config, index) for index in range(config.n_layers))
        self.ln_f = _layer_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def norm_f(self) -> nn.LayerNorm:
        return self.ln_f

    def build_mpt_alibi_tensor(
        self,
        num_heads: int,
        sequence_length: int,
        alibi_bias_max: int = 8,
        device: torch.device | None = None,
    ) -> Tensor:
        """ALiBi (arXiv:2108.12409), (H, 1, sequence_length) float32: what a key's place adds to its scores. Slopes
        fall geometrically, whatever the number of heads."""
        places = torch.arange(1 - sequence_length, 1, device=device, dtype=torch.float32)
        heads = torch.arange(1, num_heads + 1, device=device, dtype=torch.float32)
        slopes = 2.0 ** (-heads * self.config.alibi_bias_max / num_heads)
        return slopes[:, None, None] * places


class MosaicGptForCausalLM(MosaicGptPreTrainedModel, MptForCausalLM):
    """With the output head, which shares the embeddings' matrix."""

    def __init__(self, config: MosaicGptConfig):
        MptPreTrainedModel.__init__(self, config)
        self.transformer = MosaicGptModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()


def _layer_norm(config: MosaicGptConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=False)


def register_mosaic_gpt() -> None:
    """Make transformers' Auto classes know the architecture."""
    AutoConfig.register(MosaicGptConfig.model_type, MosaicGptConfig, exist_ok=True)
    AutoModelForCausalLM.register(MosaicGptConfig, MosaicGptForCausalLM, exist_ok=True)
