"""Write an adapter in PEFT's format.

``adapter_model.safetensors`` has bridge and LoRA under PEFT's prefix, so that
``peft.PeftModel.from_pretrained(base, folder)`` loads both; ``adapter_config.json`` is the LoRA
configuration, with PEFT's dummy target where there is no LoRA; ``config.json`` says which base the adapter
belongs to; beside them are the processor's files and a card.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from flamingo_ft.atomic import file_in_place
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.parts import in_parts, is_lora, trainable_parameters
from flamingo_ft.model.sharding import full_tensor

from .card import COMPARISON_FILE, write_card
from .compat import DUMMY_TARGET_MODULES
from .files import PREFIX, backbone_records, parts_in_adapter
from .lora import ADAPTER, base_name, has_lora

# The class with which AutoPeftModel loads the base, from the composition that the adapter names.
AUTO_MAPPING = {
    "base_model_class": FlamingoForConditionalGeneration.__name__,
    "parent_library": "flamingo_ft",
}
# Tokenizers record these arguments of their loading, which say nothing about the adapter.
LOADING_ARGUMENTS = ("is_local", "local_files_only")


def save_adapter(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    folder: str | Path,
    adapter: str = ADAPTER,
    write: bool = True,
) -> None:
    """Write the adapter.

    Args:
        adapter: PEFT's name of the LoRA to write, if the model has several.
        write: False in all but one of several processes; all must call this, to gather the tensors of a
            sharded model.

    Raises:
        RuntimeError: a trainable parameter would be missing from the adapter; nothing was written.
    """
    folder = Path(folder)
    tensors = {name: full_tensor(tensor) for name, tensor in adapter_tensors(model, adapter).items()}
    check_complete(model, tensors, adapter)
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors, config = _as_plain_lora(model, tensors, adapter)
    contiguous = {PREFIX + name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    with file_in_place(folder / ADAPTER_WEIGHTS) as file:
        save_file(contiguous, file, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    _config_to_save(model).save_pretrained(folder)
    save_processor(processor, folder)
    (folder / COMPARISON_FILE).unlink(missing_ok=True)  # of the weights that these replace
    write_card(folder)


def save_processor(processor: FlamingoProcessor, folder: Path) -> None:
    """Write the processor's files, the same wherever it was loaded from."""
    for key in LOADING_ARGUMENTS:
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(folder)


def adapter_tensors(model: FlamingoForConditionalGeneration, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """Return an adapter's tensors by name: LoRA, and the parts of the bridge that its base lacks."""
    parts = parts_in_adapter(model.config)
    state = model.state_dict()
    bridge = {
        _name_without_others(model, name, adapter): tensor
        for name, tensor in state.items()
        if in_parts(name, parts) and not is_lora(name)
    }
    if not has_lora(model, adapter):
        return bridge
    # PEFT would look up the vocabulary's original size on the Hub; the token rows have what was added to it.
    return bridge | get_peft_model_state_dict(model, state, adapter, save_embedding_layers=False)


def _name_without_others(model: FlamingoForConditionalGeneration, name: str, adapter: str) -> str:
    """Return a tensor's name as if ``adapter`` were the only one, without LoRA layers of others."""
    layer, base, leaf = name.partition(".base_layer.")
    if base and adapter not in cast(LoraLayer, model.get_submodule(layer)).r:
        return f"{layer}.{leaf}"
    return name


def name_in_file(name: str, adapter: str = ADAPTER) -> str:
    """Return a parameter's name as PEFT writes it: without the adapter's own name."""
    if not is_lora(name):
        return name
    plain = name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
    return plain.removesuffix(".weight") if "lora_magnitude_vector" in plain else plain


def check_complete(model: FlamingoForConditionalGeneration, tensors: dict[str, Tensor], adapter: str) -> None:
    """Raise RuntimeError if a trainable parameter is missing from ``tensors``."""
    missing = sorted({name_in_file(name, adapter) for name in trainable_parameters(model)} - set(tensors))
    if missing:
        raise RuntimeError(
            f"{len(missing)} trained parameters would not be saved, among them {missing[0]}; nothing written"
        )


def _as_plain_lora(
    model: FlamingoForConditionalGeneration, tensors: dict[str, Tensor], adapter: str
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return tensors and configuration for the base as it was loaded.

    PiSSA takes its initial A0, B0 out of the base, so B A is saved as B A - B0 A0, LoRA of twice the rank.
    """
    if not has_lora(model, adapter):
        empty = LoraConfig(base_model_name_or_path=base_name(model), target_modules=DUMMY_TARGET_MODULES)
        return tensors, dataclasses.replace(empty, inference_mode=True, auto_mapping=AUTO_MAPPING)
    # The weights are in the file: loading must neither initialize them nor take anything out of the base.
    loading = {"inference_mode": True, "init_lora_weights": True, "auto_mapping": AUTO_MAPPING}
    config = dataclasses.replace(cast(LoraConfig, model.peft_config[adapter]), **loading)
    initial: dict[str, Tensor] = getattr(model, "initial_lora", {})
    if not initial:
        return tensors, config
    tensors = {name: _minus_initial(name, tensor, initial) for name, tensor in tensors.items()}
    doubled = {
        "r": 2 * config.r,
        "lora_alpha": 2 * config.lora_alpha,
        "rank_pattern": {part: 2 * rank for part, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {part: 2 * alpha for part, alpha in (config.alpha_pattern or {}).items()},
    }
    return tensors, dataclasses.replace(config, **doubled)


def _minus_initial(name: str, tensor: Tensor, initial: dict[str, Tensor]) -> Tensor:
    """Return A with A0 below it, or B with -B0 beside it; other tensors unchanged."""
    if name not in initial:
        return tensor
    first = initial[name].to(tensor)
    return torch.cat([tensor, first], dim=0) if ".lora_A." in name else torch.cat([tensor, -first], dim=1)


def reset_name_or_path(config: FlamingoConfig) -> None:
    """Replace the path that the language model was loaded from by the name that it is recorded under."""
    language = backbone_records(config).get("language") or {}
    config.get_text_config().name_or_path = language.get("name") or ""


def _config_to_save(model: FlamingoForConditionalGeneration) -> FlamingoConfig:
    """Return the configuration without the language model's local path and the quantization of this load."""
    config = FlamingoConfig.from_dict(model.config.to_dict())
    reset_name_or_path(config)
    if (backbone_records(config).get("language") or {}).get("quantization"):
        config.get_text_config().quantization_config = None  # pyrefly: ignore[missing-attribute]
    return config
