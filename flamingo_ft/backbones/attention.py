"""Replace fused attention in OpenCLIP towers by linear layers, which can be quantized and adapted.

Three kinds of tower multiply by a matrix without calling a module for it: ``nn.MultiheadAttention`` and
OpenCLIP's own ``Attention`` keep query, key and value in a bare ``in_proj_weight``, and timm's fused
attention (EVA, BEiT, Swin v2) reads ``qkv.weight`` without calling ``qkv``. Replacing linear layers misses
the former and breaks the latter.

Shapes: N samples, Q queries, K keys, D width, H heads, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flamingo_ft.backbones.compat import OpenClipAttention
from flamingo_ft.errors import UserError


class UnfusedAttention(nn.Module):
    """`nn.MultiheadAttention` with linear layers ``in_proj`` (3D x D) and ``out_proj`` (D x D)."""

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        self.heads = fused.num_heads
        self.dropout = fused.dropout
        self.batch_first = fused.batch_first
        self.in_proj = _linear(fused.in_proj_weight, fused.in_proj_bias)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.train(fused.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """query (N, Q, D), key and value (N, K, D) -> (N, Q, D) and None; N is second unless ``batch_first``.

        attn_mask: (Q, K) or (N * H, Q, K); True where attention is blocked, or values to add to the scores.
        """
        if need_weights:
            raise UserError(
                "attention weights are not available from this vision tower; ask for its tokens only"
            )
        inputs = [x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        if query is key and key is value:
            projections = self.in_proj(inputs[0]).chunk(3, dim=-1)
        else:
            projections = [self.in_proj(x).chunk(3, dim=-1)[i] for i, x in enumerate(inputs)]
        q, k, v = (_split_heads(x, self.heads) for x in projections)
        dropout = self.dropout if self.training else 0.0
        mask = _additive_mask(attn_mask, query.dtype, self.heads)
        attended = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        tokens = self.out_proj(attended.transpose(1, 2).flatten(2))
        return tokens if self.batch_first else tokens.transpose(0, 1), None

    def fuse(self) -> nn.MultiheadAttention:
        """Return the `nn.MultiheadAttention` that this was made from."""
        fused: Any = nn.MultiheadAttention(
            self.in_proj.in_features,
            self.heads,
            dropout=self.dropout,
            bias=self.in_proj.bias is not None,
            batch_first=self.batch_first,
            device="meta",
        )
        fused.in_proj_weight, fused.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        fused.out_proj.weight, fused.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return fused.train(self.training)


class UnfusedOpenClipAttention(nn.Module):
    """OpenCLIP's ``Attention`` with a linear layer ``in_proj`` (3D x D), its norms and head scales kept."""

    KEPT_MODULES = ("ln_q", "ln_k", "attn_drop", "ln_inner", "out_proj", "out_drop")
    ln_q: nn.Module
    ln_k: nn.Module
    attn_drop: nn.Dropout
    ln_inner: nn.Module
    out_proj: nn.Linear
    out_drop: nn.Module

    def __init__(self, fused: OpenClipAttention):
        super().__init__()
        self.heads = fused.num_heads
        self.in_proj = _linear(fused.in_proj_weight, fused.in_proj_bias)
        self.head_scale = fused.head_scale
        for name in self.KEPT_MODULES:
            self.add_module(name, getattr(fused, name))
        self.train(fused.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (N, Q, D) -> (N, Q, D); attn_mask as for `UnfusedAttention`."""
        q, k, v = (_split_heads(part, self.heads) for part in self.in_proj(x).chunk(3, dim=-1))
        dropout = self.attn_drop.p if self.training else 0.0
        mask = _additive_mask(attn_mask, x.dtype, self.heads)
        attended = functional.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, mask, dropout)
        if self.head_scale is not None:
            attended = attended * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(attended.transpose(1, 2).flatten(2))))

    def fuse(self) -> OpenClipAttention:
        """Return OpenCLIP's ``Attention`` that this was made from."""
        with torch.device("meta"):
            fused: Any = OpenClipAttention(
                self.in_proj.in_features, self.heads, scale_heads=self.head_scale is not None
            )
        fused.in_proj_weight, fused.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        fused.head_scale = self.head_scale
        for name in self.KEPT_MODULES:
            setattr(fused, name, getattr(self, name))
        return fused.train(self.training)


UNFUSED = (UnfusedAttention, UnfusedOpenClipAttention)


def unfuse_attention(visual: nn.Module) -> None:
    """Make every matrix in the attention of ``visual`` a linear layer that is called, in place.

    Parameters stay the same objects under other names (``in_proj_weight`` becomes ``in_proj.weight``).
    Attention that is already unfused is left alone; so is the pooler of a CoCa tower, which comes after the
    spatial tokens and whose keys have another width than its queries. Raises UserError for attention that
    cannot be unfused.
    """
    for name, module in list(visual.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            _check_no_extra_keys(name, module)
            visual.set_submodule(name, UnfusedAttention(module))
        elif isinstance(module, OpenClipAttention):
            _check_not_scaled_cosine(name, module)
            visual.set_submodule(name, UnfusedOpenClipAttention(module))
        elif hasattr(module, "qkv_bias_separate"):  # timm's own switch: call the layer, then add the bias
            module.qkv_bias_separate = True  # pyrefly: ignore[bad-argument-type]


def restore_fused_attention(visual: nn.Module) -> None:
    """Invert `unfuse_attention`: modules, state-dict keys and values are as before (re-fuse, not reject).

    Raises UserError if a matrix is quantized or has an adapter.
    """
    for name, module in list(visual.named_modules()):
        if isinstance(module, UNFUSED):
            _check_plain_linears(name, module)
            visual.set_submodule(name, module.fuse())
        elif hasattr(module, "qkv_bias_separate"):
            # False is the default of every architecture in timm
            module.qkv_bias_separate = False  # pyrefly: ignore[bad-argument-type]


def fused_names(module: nn.Module) -> dict[str, str]:
    """Return the parameter names that `restore_fused_attention` changes: {unfused name: fused name}."""
    names = [name for name, part in module.named_modules() if isinstance(part, UNFUSED)]
    return {
        f"{name}.in_proj.{leaf}": f"{name}.in_proj_{leaf}" for name in names for leaf in ("weight", "bias")
    }


def is_unfused(visual: nn.Module) -> bool:
    """Return whether some attention of ``visual`` is as `unfuse_attention` leaves it."""
    return any(
        isinstance(part, UNFUSED) or getattr(part, "qkv_bias_separate", False) for part in visual.modules()
    )


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """Return a linear layer that uses these parameters without copying them."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, K, H * d) -> (N, H, K, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _additive_mask(mask: Tensor | None, dtype: torch.dtype, heads: int) -> Tensor | None:
    """Return the mask as values to add to the scores, (Q, K) or (N, H, Q, K).

    In a boolean mask True blocks, as in `nn.MultiheadAttention`; `scaled_dot_product_attention` means the
    opposite.
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    if mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    return mask.to(dtype)


def _check_no_extra_keys(name: str, module: nn.MultiheadAttention) -> None:
    if module.bias_k is not None or module.add_zero_attn:
        raise UserError(
            f"attention {name} of the vision tower adds keys of its own (bias_k or add_zero_attn), which "
            "does not work with quantization or LoRA; choose another tower, or use neither on it"
        )


def _check_not_scaled_cosine(name: str, module: OpenClipAttention) -> None:
    if module.logit_scale is not None:
        raise UserError(
            f"attention {name} of the vision tower is OpenCLIP's scaled_cosine, which fails in OpenCLIP "
            "itself; choose an architecture without scaled_cosine_attn"
        )


def _check_plain_linears(name: str, module: nn.Module) -> None:
    for part in ("in_proj", "out_proj"):
        layer_type = type(getattr(module, part))
        if layer_type is not nn.Linear:
            raise UserError(
                f"{name}.{part} is a {layer_type.__module__}.{layer_type.__name__}, not a plain linear "
                "layer; merge the adapter and dequantize first"
            )
