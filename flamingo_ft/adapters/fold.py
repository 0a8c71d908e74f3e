"""LoRA folded into the matrices that it updates: W' = W + scaling * B A, and DoRA's and the others' like."""

from __future__ import annotations

import dataclasses

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from flamingo_ft.backbones.quantization import is_quantized, dequantized_linear
from flamingo_ft.backbones.device_and_dtype import cast_in_range
from flamingo_ft.model import FlamingoForConditionalGeneration

from .trainable import PREFIXES, cast_parameter, is_lora


def fold_lora(model: FlamingoForConditionalGeneration, dtype: torch.dtype | None = None) -> list[str]:
    """Fold LoRA into its matrices, in place and one by one. Returns the parts that had any.

    Each sum is computed in float32, from the matrix as it was loaded or from what a quantized one stands for, and
    rounded once: to ``dtype``, by default the matrix's own, float32 for a quantized one. Raises UserError for a sum
    beyond its range.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        plain = _in_float32(name, layer, model)
        found = layer.get_base_layer().weight.dtype
        plain.merge(safe_merge=True)
        folded = plain.get_base_layer()
        final = dtype or (found if found.is_floating_point else torch.float32)
        for leaf, parameter in folded.named_parameters():
            parameter.data = cast_in_range(f"{name}.{leaf}", parameter.data, final)
        model.set_submodule(name, folded)
    if layers:
        del model.peft_config
    return [part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in layers)]


def _in_float32(name: str, layer: LoraLayer, model: FlamingoForConditionalGeneration) -> LoraLayer:
    """The layer in float32; around the matrix that its quantized one stands for, where it is quantized."""
    if not is_quantized(layer.get_base_layer()):
        return layer.float()
    alone = nn.ModuleDict({"layer": dequantized_linear(layer.get_base_layer(), torch.float32, name)})
    for adapter, config in model.peft_config.items():
        own = {"r": layer.r[adapter], "lora_alpha": layer.lora_alpha[adapter], "target_modules": ["layer"]}
        inject_adapter_in_model(
            dataclasses.replace(config, rank_pattern={}, alpha_pattern={}, **own), alone, adapter
        )
    lora = {key: tensor for key, tensor in layer.state_dict().items() if is_lora(f".{key}")}
    alone["layer"].load_state_dict(lora, strict=False)
    return alone["layer"].float()


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter that dtype, but the gates, which stay in float32; one by one."""
    for name, parameter in model.named_parameters():
        cast_parameter(name, parameter, dtype)
