"""What trains, declared once: optimizer, counts, memory plan, saving, loading and merging all ask here."""

from __future__ import annotations

import torch
from torch import nn

from flamingo_ft.backbones.device_and_dtype import cast_in_range
from flamingo_ft.config import LoraSection, TrainableSection
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_ft.model.parts import BRIDGE, in_bridge, in_parts, is_gate, is_lora

DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


def set_trainable(
    model: FlamingoForConditionalGeneration, trainable: TrainableSection, lora: LoraSection | None = None
) -> None:
    """Freeze everything, then let the declared parts and the LoRA of ``lora``'s parts train.

    The bridge and LoRA take the declared dtype, frozen or not; gates, in float32, are too fine for less.
    """
    model.requires_grad_(False)
    whole = [part for part in BRIDGE if getattr(trainable, part)]
    with_lora = lora.parts if lora else ()
    for name, parameter in model.named_parameters():
        if is_lora(name) or in_bridge(name):
            cast_parameter(name, parameter, DTYPES[trainable.dtype])
        parameter.requires_grad_(in_parts(name, with_lora if is_lora(name) else whole))
    model.config.adapter_parts = list(BRIDGE) if model.config.bridge_init is None else whole
    if (
        model.config.bridge_init is not None
    ):  # what stays frozen of it is not in the adapter, but has this format
        model.config.bridge_init["dtype"] = str(DTYPES[trainable.dtype]).removeprefix("torch.")


def cast_parameter(name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parameter another dtype; not the gates, which stay in float32, nor what is quantized.

    Raises UserError for a value beyond the range of ``dtype``.
    """
    if parameter.is_floating_point():
        parameter.data = cast_in_range(name, parameter.data, parameter_dtype(name, dtype))


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the parameter ``name`` in a model of ``dtype``: the gates are too fine for less than float32."""
    return torch.float32 if is_gate(name) else dtype


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parts_in_adapter(config: FlamingoConfig) -> list[str]:
    """The parts of the bridge that the adapter holds whole; a bridge that started from nothing is held whole."""
    return list(BRIDGE) if config.adapter_parts is None else config.adapter_parts
