"""``from_pretrained`` with a ``quantization_config``: what transformers' quantizer does not do for a
Flamingo.

The quantizer replaces modules that are exactly ``nn.Linear``. The language model's output head, whose rows
the Flamingo reads, has to be excluded; the tower's fused attention has to be split into linear layers and
quantized afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from flamingo_ft.backbones.quantization import normalize_bnb_layers, quantization_formats
from flamingo_ft.backbones.tower import quantize_tower
from flamingo_ft.errors import UserError

from .compat import forget_weight_conversions, should_convert_module
from .configuration import FlamingoConfig

TOWER = "vision_encoder"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def exclude_output_head(quantization: Any, config: FlamingoConfig) -> Any:
    """Return a copy of a bitsandbytes ``quantization_config`` that skips the language model's output head.

    A configuration of another library is returned as it is.
    """
    if isinstance(quantization, dict):
        quantization = BitsAndBytesConfig.from_dict(quantization)
    if not isinstance(quantization, BitsAndBytesConfig):
        return quantization
    quantization = copy.deepcopy(quantization)
    skipped = [*(quantization.llm_int8_skip_modules or []), *_head_names(config)]
    quantization.llm_int8_skip_modules = list(dict.fromkeys(skipped))
    return quantization


def stored_config(name: Any, options: Mapping[str, Any]) -> FlamingoConfig:
    """Return the configuration of the model that ``from_pretrained(name, **options)`` would load."""
    given = options.get("config")
    if isinstance(given, FlamingoConfig):
        return given
    return FlamingoConfig.from_pretrained(
        given or name, **{key: options[key] for key in HUB_OPTIONS if key in options}
    )


def finish_quantized(model: Any, just_quantized: bool) -> None:
    """Finish a Flamingo that transformers has loaded.

    just_quantized: whether its weights were quantized while they were loaded, rather than stored quantized.
    """
    config = getattr(model.config, "quantization_config", None)
    if just_quantized and isinstance(config, BitsAndBytesConfig):
        _quantize_rest_of_tower(model, config)
    elif isinstance(config, BitsAndBytesConfig):
        forget_weight_conversions(model)
    normalize_bnb_layers(model)
    mark_quantized(model)


def _quantize_rest_of_tower(model: Any, config: BitsAndBytesConfig) -> None:
    skipped = config.llm_int8_skip_modules
    if should_convert_module(TOWER, skipped):
        visual = model.vision_encoder
        quantize_tower(
            visual, config, keep=lambda name: not should_convert_module(f"{TOWER}.{name}", skipped)
        )
        model.config.open_attention = True


def mark_quantized(model: Any) -> None:
    """Set ``is_loaded_in_4bit`` and ``is_loaded_in_8bit``, which PEFT and accelerate read on the model they
    are given.
    """
    formats = quantization_formats(model)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "4bit" in formats, "int8" in formats


def check_saveable(model: nn.Module) -> None:
    """Raise UserError for a model that ``save_pretrained`` would write in a form that cannot be loaded: one
    with LoRA layers, or with quantized layers that transformers did not make.
    """
    if getattr(model, "peft_config", None):
        raise UserError(
            "save_pretrained: a Flamingo with LoRA cannot be saved whole; save its adapter with "
            "save_adapter, or merge that"
        )
    if quantization_formats(model) and getattr(model, "hf_quantizer", None) is None:
        raise UserError(
            "save_pretrained: a Flamingo built from quantized backbones cannot be saved whole; save its "
            "adapter, or save it unquantized and load that with a quantization_config"
        )


def _head_names(config: FlamingoConfig) -> list[str]:
    """Return the name of the language model's output head in the Flamingo."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config.text_config)
    return [
        f"lang_encoder.{name}" for name, module in lm.named_modules() if module is lm.get_output_embeddings()
    ]
