"""Prepare a model for training: set the trainable parameters, quantize frozen parts, add LoRA.

Also DPO's frozen reference, which is prepared from the same model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from flamingo_ft.backbones.quantization import Quantization, is_quantized, shared_quantization_state
from flamingo_ft.config import LoraSection, Recipe, TrainableSection
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import BRIDGE, cast_parameter, in_bridge, in_parts, is_lora

from .files import read_lora_config
from .init_from import lora_to_start_from
from .load import load_lora_weights, quantize_frozen_bridge
from .lora import add_lora
from .lora_init import Batches
from .tile_checks import check_places_are_learned

DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
# LoRA settings that must be equal for weights to carry over from another adapter.
LORA_SHAPE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora")


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
    if model.config.bridge_init is not None:  # to load frozen parts, which the adapter lacks, in this dtype
        model.config.bridge_init["dtype"] = str(DTYPES[trainable.dtype]).removeprefix("torch.")


def prepare_training(
    model: FlamingoForConditionalGeneration, recipe: Recipe, batches: Batches | None = None
) -> None:
    """Quantize the frozen parts of the bridge, add LoRA and set the trainable parameters, all in place.

    If the recipe starts from an adapter with LoRA, its LoRA weights are trained further. Raises UserError
    unless the recipe asks for the same LoRA.

    Args:
        batches: returns some training batches, for an initialization of LoRA that needs them.
    """
    set_trainable(model, recipe.trainable)
    check_places_are_learned(model)
    if recipe.model.bridge_quantization != "none":
        quantization = Quantization(
            recipe.model.bridge_quantization, compute_dtype=recipe.model.language.compute_dtype
        )
        model.config.bridge_quantization = quantization.record()
        quantize_frozen_bridge(model, quantization)
    start = recipe.model.init_from
    earlier = lora_to_start_from(start)
    lora = _lora_of_earlier_weights(recipe.lora, start) if start is not None and earlier else recipe.lora
    config = add_lora(model, lora, batches)
    if start is not None and earlier:
        _check_same_lora(start, config)
        load_lora_weights(model, earlier)
    set_trainable(model, recipe.trainable, recipe.lora)


def _lora_of_earlier_weights(lora: LoraSection, start: str | Path) -> LoraSection:
    """Return ``lora`` without an initialization, which the weights replace; by default, with their rsLoRA."""
    earlier = read_lora_config(fetch_model(start))
    assert earlier is not None  # it has LoRA weights
    use_rslora = earlier.use_rslora if lora.use_rslora is None else lora.use_rslora
    return lora.model_copy(update={"init_lora_weights": "default", "use_rslora": use_rslora})


def _check_same_lora(start: str | Path, config: LoraConfig | None) -> None:
    earlier = read_lora_config(fetch_model(start))
    differing = [key for key in LORA_SHAPE if config is None or getattr(config, key) != getattr(earlier, key)]
    if differing:
        key = differing[0]
        requested = "none" if config is None else getattr(config, key)
        raise UserError(
            f"model.init_from: {start} has LoRA with {key} {getattr(earlier, key)}, the recipe {requested}; "
            "give the recipe the same lora section, so that it is trained further and not lost (an adapter "
            "that began as PiSSA has twice the r and lora_alpha of its recipe)"
        )


def frozen_copy(model: FlamingoForConditionalGeneration) -> FlamingoForConditionalGeneration:
    """Return a copy of ``model`` in eval mode that keeps its weights while ``model`` trains: DPO's reference.

    Modules, hooks and trainable parameters are copied; frozen parameters, buffers and the state of quantized
    layers are shared, so the copy costs as much memory as the trainable parameters. Call this before a
    trainer wraps ``model.forward``.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        copied = nn.Parameter(parameter.detach().clone(), False) if parameter.requires_grad else parameter
        memo[id(parameter)] = copied
    for module in model.modules():
        memo |= shared_quantization_state(module)
    return copy.deepcopy(model, memo).eval()


def match_training_mode(reference: nn.Module, training: bool) -> None:
    """Put quantized layers of the reference in the policy's mode.

    On a CPU, bitsandbytes' 8-bit layers round activations in eval mode only.
    """
    for module in reference.modules():
        if is_quantized(module):
            module.train(training)


def zero_dropout(model: nn.Module) -> None:
    """Zero dropout rates that transformers keeps as numbers (OPT, BART, ...); TRL handles the modules."""
    for module in model.modules():
        for name, rate in vars(module).items():
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.0)
