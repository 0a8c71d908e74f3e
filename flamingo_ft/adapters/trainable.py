"""The trainable set, declared once: optimizer, counts, memory plan, save, load and merge all use it."""

from __future__ import annotations

import torch
from torch import nn

from flamingo_ft.backbones.quantization import cast_in_range
from flamingo_ft.config import LoraSection, TrainableSection
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_ft.model.parts import BRIDGE, in_bridge, in_parts, is_gate, is_lora

DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


def set_trainable(
    model: FlamingoForConditionalGeneration, trainable: TrainableSection, lora: LoraSection | None = None
) -> None:
    """Freeze everything but the declared parts and the LoRA weights of ``lora``'s parts.

    Bridge and LoRA weights are cast to the declared dtype, frozen or not; gates stay in float32.
    """
    model.requires_grad_(False)
    whole = [part for part in BRIDGE if getattr(trainable, part)]
    with_lora = lora.parts if lora else ()
    for name, parameter in model.named_parameters():
        if is_lora(name) or in_bridge(name):
            cast_parameter(name, parameter, DTYPES[trainable.dtype])
        parameter.requires_grad_(in_parts(name, with_lora if is_lora(name) else whole))
    model.config.adapter_parts = list(BRIDGE) if model.config.bridge_init is None else whole
    if model.config.bridge_init is not None:  # its frozen parts are not in the adapter, but have this dtype
        model.config.bridge_init["dtype"] = str(DTYPES[trainable.dtype]).removeprefix("torch.")


def cast_parameter(name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Cast a parameter, unless it is a gate, which stays in float32, or quantized.

    Raises UserError for a value beyond the range of ``dtype``.
    """
    if parameter.is_floating_point():
        parameter.data = cast_in_range(name, parameter.data, parameter_dtype(name, dtype))


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the parameter ``name`` in a model of ``dtype``: gates stay in float32."""
    return torch.float32 if is_gate(name) else dtype


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parts_in_adapter(config: FlamingoConfig) -> list[str]:
    """Return the parts of the bridge that the adapter holds; all of a bridge trained from scratch."""
    return list(BRIDGE) if config.adapter_parts is None else config.adapter_parts
