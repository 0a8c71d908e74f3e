"""Layers shared by the perceiver resampler and the gated cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .compat import GradientCheckpointingLayer


def feed_forward(width: int, mult: int) -> nn.Sequential:
    """Return LayerNorm and a bias-free GELU MLP of hidden width ``width * mult`` (Flamingo, appendix A.1)."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width * mult, bias=False),
        nn.GELU(),
        nn.Linear(width * mult, width, bias=False),
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., N, heads * d) -> (..., heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention whose output is zero for a query with no visible key.

    query (B, H, Q, d); key, value (B, H, K, d); visible (B, 1, Q, K) bool, None if every key is visible.
    """
    if visible is None:
        return functional.scaled_dot_product_attention(query, key, value)
    sees = visible.any(-1, keepdim=True)
    # Softmax over no visible key is 0/0, so such a row sees every key, and its output is replaced.
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible | ~sees)
    return torch.where(sees, attended, 0.0)


def attention_weights(query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return the weights of `attend` in float32, (B, H, Q, K): zero for a query with no visible key.

    The arguments are those of `attend`.
    """
    # Autocast would multiply in 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
        if visible is None:
            return scores.softmax(-1)
        # Softmax over no visible key is 0/0; masking the result replaces it too.
        return scores.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)


class CheckpointedBlock(GradientCheckpointingLayer):
    """A block for `gradient_checkpointing_enable` that gets gradients in every checkpointing mode.

    Reentrant checkpointing gives *no* gradient to a block's parameters when none of its tensor inputs
    requires one, which is the usual case on top of a frozen model. It looks at positional arguments alone, so
    tensors are passed positionally.
    """

    def entry(self, x: Tensor) -> Tensor:
        """Return ``x``, as a leaf that requires a gradient if the parameters would get none otherwise."""
        recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return x.detach().requires_grad_() if recomputed and not x.requires_grad else x
