"""A whole Flamingo in 8 or 4 bits: what transformers' own quantizer leaves to do.

It replaces what is exactly ``nn.Linear``. Left to do: keep the language model's output head out of it, whose rows the
Flamingo reads, and quantize the matrices of the tower's attention, which are no linear layers before they are opened.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from flamingo_ft.backbones.quantization import normalize_bnb_layers, quantization_formats
from flamingo_ft.backbones.tower import quantize_tower
from flamingo_ft.errors import UserError

from .configuration import FlamingoConfig

TOWER = "vision_encoder"
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def keeping_the_head(wanted: Any, config: FlamingoConfig) -> Any:
    """The quantization that is ``wanted`` of the model of ``config``, without the language model's output head.

    Only bitsandbytes' is changed, and a copy of it.
    """
    wanted = BitsAndBytesConfig.from_dict(wanted) if isinstance(wanted, dict) else wanted
    if not isinstance(wanted, BitsAndBytesConfig):
        return wanted
    wanted = copy.deepcopy(wanted)
    kept = [*(wanted.llm_int8_skip_modules or []), *_head_names(config)]
    wanted.llm_int8_skip_modules = list(dict.fromkeys(kept))
    return wanted


def stored_config(name: Any, options: Mapping[str, Any]) -> FlamingoConfig:
    """The configuration of the model that ``from_pretrained`` is asked for by ``name`` and ``options``."""
    given = options.get("config")
    if isinstance(given, FlamingoConfig):
        return given
    return FlamingoConfig.from_pretrained(
        given or name, **{key: options[key] for key in WHERE if key in options}
    )


def finish_quantized(model: nn.Module, is_new: bool) -> None:
    """Do what transformers leaves to do after loading a Flamingo.

    is_new: whether it was quantized just now, rather than before it was saved.
    """
    config = getattr(model.config, "quantization_config", None)
    if is_new and isinstance(config, BitsAndBytesConfig):
        _quantize_rest_of_tower(model, config)
    elif isinstance(config, BitsAndBytesConfig):
        model._weight_conversions = (
            None  # transformers 5.23 cannot save again what it has read in these formats
        )
    normalize_bnb_layers(model)
    mark_quantized(model)


def _quantize_rest_of_tower(model: nn.Module, config: BitsAndBytesConfig) -> None:
    kept = config.llm_int8_skip_modules
    if should_convert_module(TOWER, kept):
        visual = model.vision_encoder
        quantize_tower(visual, config, keep=lambda name: not should_convert_module(f"{TOWER}.{name}", kept))
        model.config.open_attention = True


def mark_quantized(model: nn.Module) -> None:
    """Say of a model what formats its parts are in, where PEFT and accelerate look: on the model they are given."""
    formats = quantization_formats(model)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "4bit" in formats, "int8" in formats


def refuse_put_together(model: nn.Module) -> None:
    """Refuse to save whole what could not be read again: a model with LoRA beside its matrices, and one with quantized
    parts that transformers did not quantize."""
    if getattr(model, "peft_config", None):
        raise UserError(
            "a Flamingo with LoRA cannot be saved whole; save its adapter with save_adapter, or merge that"
        )
    if quantization_formats(model) and getattr(model, "hf_quantizer", None) is None:
        raise UserError(
            "a Flamingo put together from quantized backbones cannot be saved whole; save its adapter, or save it "
            "unquantized and load that with a quantization_config"
        )


def _head_names(config: FlamingoConfig) -> list[str]:
    """The language model's output head, as the Flamingo names it."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config.text_config)
    return [
        f"lang_encoder.{name}" for name, module in lm.named_modules() if module is lm.get_output_embeddings()
    ]
