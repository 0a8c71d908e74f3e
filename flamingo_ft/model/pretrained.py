"""``from_pretrained`` and ``save_pretrained``: what a Flamingo needs besides transformers' own code.

- Adapters, and compositions that name two backbones, are found and fetched here. `flamingo_ft.adapters`,
  which is built on the model, loads them (`FlamingoForConditionalGeneration.set_adapter_loader`).
- With a ``quantization_config``, transformers' quantizer replaces modules that are exactly ``nn.Linear``. The
  language model's output head, whose rows the Flamingo reads, has to be excluded; the tower's fused attention
  has to be split into linear layers and quantized afterwards.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from flamingo_ft.backbones.quantization import normalize_bnb_layers, quantization_formats
from flamingo_ft.backbones.tower import quantize_tower
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.hub.names import NAME, HubName, check_path_exists
from flamingo_ft.hub.weight_files import ADAPTER_CONFIG, CONFIG_FILE, MODEL_WEIGHTS

from .compat import forget_weight_conversions, should_convert_module
from .configuration import FlamingoConfig

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
FETCH_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")  # of huggingface_hub
TOWER = "vision_encoder"


@dataclass(frozen=True)
class AdapterFolders:
    """The folder of an adapter and of the composition that it names as its base, one of them or both."""

    base: Path | None
    adapter: Path | None


def find_adapter(name: Any, options: Mapping[str, Any]) -> AdapterFolders | None:
    """Return the local folders of the adapter or composition that ``from_pretrained(name, **options)`` names.

    None for a whole model, and for a name that transformers is to refuse.
    """
    adapter = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if name is None or (Path(name).is_dir() and not is_partial(Path(name))):
        return None
    if adapter is not None and str(adapter) != str(name):  # an adapter on the Hub and its base
        base = name if options.get("revision") else _as_recorded(str(name))
        adapter_options = {**options, "revision": None, **options["adapter_kwargs"]}
        return AdapterFolders(_fetch(base, options), _fetch(adapter, adapter_options))
    check_path_exists(name)
    if not Path(name).is_dir() and _is_merged(name, options):
        return None
    folder = _fetch(name, options)
    if not is_partial(folder):
        return None
    if not (folder / ADAPTER_CONFIG).is_file():
        return AdapterFolders(folder, None)
    base = None if Path(name).is_dir() else named_composition(folder)
    return AdapterFolders(None if base is None else _fetch(base, {**options, "revision": None}), folder)


def _is_merged(name: Any, options: Mapping[str, Any]) -> bool:
    """Return whether a repository's configuration is that of a merged model.

    Raises UserError for another architecture.
    """
    if isinstance(options.get("config"), FlamingoConfig):
        return bool(options["config"].merged)
    where = {key: options[key] for key in HUB_OPTIONS if key in options}
    config, _ = FlamingoConfig.get_config_dict(name, **where)
    if config.get("model_type") != FlamingoConfig.model_type:
        raise UserError(
            f"{name}: expected a Flamingo, got model_type {config.get('model_type')!r}; if an adapter "
            "names it as its base, load the adapter's folder itself, or let the adapter name a composition"
        )
    return bool(config.get("merged"))


def is_partial(folder: Path) -> bool:
    """Return whether a folder has a Flamingo's configuration but not the weights of a whole model."""
    return (folder / CONFIG_FILE).is_file() and not any(
        any(folder.glob(weights)) for weights in MODEL_WEIGHTS
    )


def named_composition(adapter: Path) -> str | None:
    """Return the composition that an adapter names as its base; None if it names its language model alone."""
    config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    peft_config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = peft_config.get("base_model_name_or_path")
    language = (config.get("backbones") or {}).get("language") or {}
    if base is None or base == language.get("name"):
        return None
    return _as_recorded(base, peft_config.get("revision"))


def _as_recorded(name: str, revision: str | None = None) -> str:
    """Return a recorded base so that it is not mistaken for a local folder.

    Names on the Hub get their revision.
    """
    match = None if os.path.exists(name) else NAME.fullmatch(name)
    if match is None:
        return name
    return str(HubName(match["repository"], revision or match["revision"] or "main"))


def _fetch(name: Any, options: Mapping[str, Any]) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder / (options.get("subfolder") or "")
    if options.get("subfolder"):
        raise UserError(
            f"{name}: adapters and compositions are read from the top of a repository; leave subfolder out"
        )
    fetch_options = {key: options[key] for key in FETCH_OPTIONS if options.get(key) is not None}
    revision = options.get("revision")
    return fetch_model(f"{name}@{revision}" if revision else name, **fetch_options)


# --- quantization ---


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
    config = options.get("config")
    if isinstance(config, FlamingoConfig):
        return config
    return FlamingoConfig.from_pretrained(
        config or name, **{key: options[key] for key in HUB_OPTIONS if key in options}
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
    """Set ``is_loaded_in_4bit`` and ``is_loaded_in_8bit``, which PEFT and accelerate read."""
    formats = quantization_formats(model)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "4bit" in formats, "int8" in formats


def check_saveable(model: nn.Module) -> None:
    """Raise UserError for a model that ``save_pretrained`` would write in a form that cannot be loaded.

    That is one with LoRA layers, or with quantized layers that transformers did not make.
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
