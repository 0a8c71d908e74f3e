"""LoRA folded into the matrices that it updates: W' = W + scaling * B A, and DoRA's and the others' like."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from flamingo_ft.backbones.quantization import formats_in
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration

from .trainable import PREFIXES, cast_parameter


def fold_lora(model: FlamingoForConditionalGeneration) -> list[str]:
    """Fold every update into its matrix, in place and one by one. Returns the parts that had any.

    Raises UserError for a quantized matrix: it would be rounded again, and drift from what was trained.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if formats_in(layer):
            raise UserError(f"layer {name} is quantized and cannot take its update in; merge into an unquantized base")
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    if layers:
        del model.peft_config
    return [part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in layers)]


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter that number format, but the gates, which stay in float32; one by one."""
    for name, parameter in model.named_parameters():
        cast_parameter(name, parameter, dtype)
