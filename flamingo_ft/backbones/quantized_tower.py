"""OpenCLIP towers whose every matrix is kept in 8 or 4 bits, those of fused attention included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn
from transformers import BitsAndBytesConfig

from flamingo_ft.backbones.attention import open_attention
from flamingo_ft.backbones.quantization import Quantization, quantize_linears
from flamingo_ft.errors import UserError


def quantize_tower(
    visual: nn.Module,
    quantization: Quantization | BitsAndBytesConfig,
    device: torch.device | str | None = None,
    *,
    keep: Callable[[str], bool] = lambda name: False,
) -> None:
    """Open the attention of ``visual`` and quantize its linear layers, in place; the rest of it follows to ``device``.

    device: None leaves each part where it is.
    keep: the names of layers that stay as they are.
    Raises UserError for a tower without matrices to quantize, and for a layer that the format cannot take.
    """
    refuse_without_matrices(visual)
    open_attention(visual)
    closed = [name for name, module in visual.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = tuple(f"{name}." for name in closed)  # these read their matrices past the modules
    quantize_linears(visual, quantization, device, keep=lambda name: name.startswith(inside) or keep(name))
    if device is not None:
        visual.to(device)


def refuse_without_matrices(visual: nn.Module) -> None:
    """A head over convolutions does not count: the spatial tokens do not go through it."""
    if isinstance(visual, VisionTransformer):
        return
    trunk = visual.trunk if isinstance(visual, TimmModel) else nn.Module()
    head = trunk.get_classifier() if isinstance(visual, TimmModel) else None
    if not any(isinstance(module, nn.Linear) and module is not head for module in trunk.modules()):
        raise UserError(
            f"vision tower {type(getattr(visual, 'trunk', visual)).__name__} has convolutions and no matrices that "
            "could be quantized; set its quantization to none, or choose a ViT, SigLIP, EVA or ConvNeXt tower"
        )
