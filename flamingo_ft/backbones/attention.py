"""Attention of OpenCLIP towers with ordinary linear layers for its matrices, which can be quantized and adapted.

Three kinds of tower multiply by a matrix without calling a module for it: ``nn.MultiheadAttention`` and OpenCLIP's own
``Attention`` keep query, key and value in a bare ``in_proj_weight``, and timm's fused attention (EVA, BEiT, Swin v2)
reads ``qkv.weight`` past its module. Whoever replaces linear layers misses the former and breaks the latter.

Shapes: N samples, Q queries, K keys, D width, H heads, d width of a head.
"""

from __future__ import annotations

import torch
from open_clip.transformer import Attention as CustomAttention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flamingo_ft.errors import UserError


class OpenAttention(nn.Module):
    """``nn.MultiheadAttention`` with ``in_proj`` (3D x D) and ``out_proj`` (D x D), which share its parameters."""

    def __init__(self, closed: nn.MultiheadAttention):
        super().__init__()
        self.heads = closed.num_heads
        self.dropout = closed.dropout
        self.batch_first = closed.batch_first
        self.in_proj = _linear(closed.in_proj_weight, closed.in_proj_bias)
        self.out_proj = _linear(closed.out_proj.weight, closed.out_proj.bias)
        self.train(closed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """query (N, Q, D), key and value (N, K, D), the N second unless ``batch_first`` -> (N, Q, D) and no weights.

        attn_mask: (Q, K) or (N * H, Q, K), True where a query may not look, or what to add to its scores.
        """
        if need_weights:
            raise UserError(
                "attention weights were asked of a vision tower that computes none; ask for tokens only"
            )
        given = (query, key, value)
        projected = {id(x): self.in_proj(x if self.batch_first else x.transpose(0, 1)) for x in given}
        parts = (_heads(projected[id(x)].chunk(3, dim=-1)[i], self.heads) for i, x in enumerate(given))
        dropout = self.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(*parts, _added(attn_mask, query, self.heads), dropout)
        tokens = self.out_proj(attended.transpose(1, 2).flatten(2))
        return tokens if self.batch_first else tokens.transpose(0, 1), None

    def close(self) -> nn.MultiheadAttention:
        """The module that this was made of."""
        shape, bias = (self.in_proj.in_features, self.heads), self.in_proj.bias is not None
        closed = nn.MultiheadAttention(
            *shape, dropout=self.dropout, bias=bias, batch_first=self.batch_first, device="meta"
        )
        closed.in_proj_weight, closed.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        closed.out_proj.weight, closed.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return closed.train(self.training)


class OpenCustomAttention(nn.Module):
    """OpenCLIP's ``Attention`` with ``in_proj`` (3D x D), its norms and scales of heads included."""

    KEPT = ("ln_q", "ln_k", "attn_drop", "ln_inner", "out_proj", "out_drop")

    def __init__(self, closed: CustomAttention):
        super().__init__()
        self.heads = closed.num_heads
        self.in_proj = _linear(closed.in_proj_weight, closed.in_proj_bias)
        self.head_scale = closed.head_scale
        for name in self.KEPT:
            self.add_module(name, getattr(closed, name))
        self.train(closed.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x (N, Q, D) -> (N, Q, D); attn_mask as for `OpenAttention`."""
        query, key, value = (_heads(part, self.heads) for part in self.in_proj(x).chunk(3, dim=-1))
        dropout = self.attn_drop.p if self.training else 0.0
        mask = _added(attn_mask, x, self.heads)
        attended = scaled_dot_product_attention(self.ln_q(query), self.ln_k(key), value, mask, dropout)
        if self.head_scale is not None:
            attended = attended * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(attended.transpose(1, 2).flatten(2))))

    def close(self) -> CustomAttention:
        """The module that this was made of."""
        with torch.device("meta"):
            closed = CustomAttention(
                self.in_proj.in_features, self.heads, scale_heads=self.head_scale is not None
            )
        closed.in_proj_weight, closed.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        closed.head_scale = self.head_scale
        for name in self.KEPT:
            setattr(closed, name, getattr(self, name))
        return closed.train(self.training)


def open_attention(visual: nn.Module) -> None:
    """Give every attention of ``visual``, in place, matrices that are linear layers and are called as such.

    The parameters stay the same objects, under other names (``in_proj_weight`` is now ``in_proj.weight``). Does
    nothing to what is open already. The pooler of a CoCa tower, whose keys are of another width than its queries, stays
    as it is: it comes after the spatial tokens. Raises UserError for an attention that cannot be opened.
    """
    for name, module in list(visual.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            _refuse_extra_keys(name, module)
            visual.set_submodule(name, OpenAttention(module))
        elif isinstance(module, CustomAttention):
            _refuse_scaled_cosine(name, module)
            visual.set_submodule(name, OpenCustomAttention(module))
        elif hasattr(module, "qkv_bias_separate"):  # timm's own switch
            module.qkv_bias_separate = True


def close_attention(visual: nn.Module) -> None:
    """The inverse of `open_attention`: state-dict keys and bits as they were.

    Raises UserError where a matrix is quantized or carries an adapter.
    """
    for name, module in list(visual.named_modules()):
        if isinstance(module, (OpenAttention, OpenCustomAttention)):
            _refuse_changed(name, module)
            visual.set_submodule(name, module.close())
        elif hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = False  # no architecture of timm's sets it


def closed_names(module: nn.Module) -> dict[str, str]:
    """Return the names that `close_attention` changes: that of each parameter now, and the one that it gets back."""
    opened = [
        name
        for name, part in module.named_modules()
        if isinstance(part, (OpenAttention, OpenCustomAttention))
    ]
    return {
        f"{name}.in_proj.{leaf}": f"{name}.in_proj_{leaf}" for name in opened for leaf in ("weight", "bias")
    }


def is_open(visual: nn.Module) -> bool:
    """Whether some attention of ``visual`` is as `open_attention` leaves it."""
    opened = (OpenAttention, OpenCustomAttention)
    return any(
        isinstance(part, opened) or getattr(part, "qkv_bias_separate", False) for part in visual.modules()
    )


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer of these very parameters."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, K, H * d) -> (N, H, K, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _added(mask: Tensor | None, like: Tensor, heads: int) -> Tensor | None:
    """The mask as what is added to the scores, (Q, K) or (N, H, Q, K).

    Given as bool, True blocks; to torch's own function it would mean the opposite.
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return (mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask).to(like.dtype)


def _refuse_extra_keys(name: str, module: nn.MultiheadAttention) -> None:
    if module.bias_k is not None or module.add_zero_attn:
        raise UserError(
            f"attention {name} of the vision tower adds keys of its own (bias_k or add_zero_attn), which its form with "
            "linear layers does not have; choose another tower, or leave it unquantized and without LoRA"
        )


def _refuse_scaled_cosine(name: str, module: CustomAttention) -> None:
    if module.logit_scale is not None:
        raise UserError(
            f"attention {name} of the vision tower is OpenCLIP's scaled_cosine, which fails in OpenCLIP itself; "
            "choose an architecture without scaled_cosine_attn"
        )


def _refuse_changed(name: str, module: nn.Module) -> None:
    for part in ("in_proj", "out_proj"):
        found = type(getattr(module, part))
        if found is not nn.Linear:
            remedy = "merge the adapter and dequantize first"
            raise UserError(
                f"{name}.{part} is a {found.__module__}.{found.__name__}, no plain linear layer; {remedy}"
            )
