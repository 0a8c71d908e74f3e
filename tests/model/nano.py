"""A Flamingo of the nano backbones with a new bridge, its gates open, and its processor."""

from __future__ import annotations

from typing import Any

import torch

from flamingo_ft import build_flamingo, load_language, load_vision
from flamingo_ft.adapters import set_trainable
from flamingo_ft.config import TrainableSection
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor


def nano_flamingo(
    perceiver: dict[str, Any], *, vision: dict[str, Any] | None = None, **options: Any
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """vision: options of `load_vision`; options: those of `build_flamingo`."""
    torch.manual_seed(0)
    backbones = load_vision("nano", **(vision or {})), load_language("nano")
    model, processor = build_flamingo(*backbones, perceiver=perceiver, **options)
    set_trainable(model, TrainableSection())
    with torch.no_grad():
        for block in filter(None, model.gated_cross_attn_layers):
            block.attn_gate.fill_(1)
    return model.eval(), processor
