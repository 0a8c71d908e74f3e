"""The gated cross-attention block, through which text tokens attend to media.

Flamingo (arXiv:2204.14198), section 3.1.2 and figure 4: y = y + tanh(a) * attention(y, media), then y = y +
tanh(b) * feed_forward(y), with a = b = 0 at the start, so that an untrained block changes nothing. Shapes: B
samples, R rows of text (B times the beams or returned sequences), T text tokens, D text width, M media, L
latents, V their width, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import (
    CheckpointedBlock,
    attend,
    attention_weights,
    feed_forward,
    merge_heads,
    split_heads,
)
from .sight import Group, Sight


class MaskedCrossAttention(nn.Module):
    """Cross-attention of text tokens to the latents of the media they see; zero for tokens that see none."""

    def __init__(self, dim: int, dim_visual: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_visual, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def project(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Project latents (B, M, L, V) to keys and values, each (B, M, H, L, d)."""
        key, value = self.to_kv(latents.to(self.norm.weight.dtype)).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        """x (R, T, D); key, value (B, M, H, L, d) -> (R, T, D)."""
        if sight.groups is None:
            query, key, seen = self._all_media(x, key, sight)
            attended = attend(query, key, _join_media(value), seen)
            return self.to_out(merge_heads(attended)).reshape(x.shape)
        flat, tokens = x.flatten(0, 1), sight.tokens
        query = self.to_q(self.norm(flat if tokens is None else flat[tokens])).unflatten(-1, (self.heads, -1))
        parts = query.split([len(group.tokens) for group in sight.groups])
        attended = torch.cat([_attend(*one, key, value) for one in zip(sight.groups, parts, strict=True)])
        output = self.to_out(attended)
        if tokens is not None:
            output = output.new_zeros(flat.shape).index_copy(0, tokens, output)
        return output.view(x.shape)

    def weights(self, x: Tensor, key: Tensor, sight: Sight) -> Tensor:
        """Return the attention weights of `forward` in float32: (B, H, R / B * T, M * L)."""
        return attention_weights(*self._all_media(x, key, sight))

    def _all_media(self, x: Tensor, key: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, R / B * T, d), keys (B, H, M * L, d), and which a query sees (B, 1, ., .).

        The R / B rows of a sample are adjacent and become one long query, so that the keys and values of a
        sample are stored once however many beams there are.
        """
        query = self.to_q(self.norm(x)).reshape(len(key), -1, self.heads * key.shape[-1])
        seen = sight.latents_seen.reshape(len(key), 1, query.shape[1], -1)
        return split_heads(query, self.heads), _join_media(key), seen


def _join_media(x: Tensor) -> Tensor:
    """(B, M, H, L, d) -> (B, H, M * L, d)."""
    return x.transpose(1, 2).flatten(2, 3)


def _attend(group: Group, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Let the tokens of a group attend to the medium that each sees.

    query (N, H, d); key, value (B, M, H, L, d) -> (N, H * d).
    """
    key, value = (x.flatten(0, 1)[group.media] for x in (key, value))
    attended = attend(group.pad(query).transpose(1, 2), key, value, group.mask)
    return group.unpad(merge_heads(attended))


class GatedCrossAttentionBlock(CheckpointedBlock):
    """Gated cross-attention and gated feed-forward, run before a decoder layer of the language model."""

    def __init__(self, *, dim: int, dim_visual: int, dim_head: int = 64, heads: int = 8, ff_mult: int = 4):
        super().__init__()
        self.attn = MaskedCrossAttention(dim, dim_visual, heads, dim_head)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden: Tensor,
        latents: Tensor | None,
        sight: Sight | None,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden (R, T, D); latents (B, M, L, V) and ``sight``, or None for text without media.

        Returns hidden, and the keys and values, which a later call over the same media may pass to skip the
        projection. The feed-forward applies to text without media too, as in OpenFlamingo.
        """
        x = hidden.to(self.attn.norm.weight.dtype)
        if latents is not None:
            key, value = (key, value) if key is not None else self.attn.project(latents)
            x = x + _tanh_gate(self.attn_gate, x) * self.attn(x, key, value, sight)
        x = x + _tanh_gate(self.ff_gate, x) * self.ff(x)
        return x.to(hidden.dtype), key, value


def _tanh_gate(gate: Tensor, x: Tensor) -> Tensor:
    """Return tanh(gate) in the dtype of ``x``: gates may be in float32 beside bfloat16 matrices."""
    return gate.tanh().to(x.dtype)
