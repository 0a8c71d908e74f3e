"""An adapter on disk: PEFT's format, holding what was trained.

``adapter_model.safetensors`` has bridge and LoRA under PEFT's prefix, so that ``peft.PeftModel.from_pretrained(base,
folder)`` puts both in place; ``adapter_config.json`` is the LoRA configuration, without a target where there is no LoRA;
``config.json`` says which base the adapter belongs to; beside them the processor's files and a card.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor

from flamingo_ft.atomic import file_in_place
from flamingo_ft.hub.weight_files import ADAPTER_WEIGHTS
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.parts import in_parts, is_lora
from flamingo_ft.model.sharding import whole

from .card import write_card
from .files import PREFIX
from .lora import ADAPTER, base_name, has_lora
from .trainable import parts_in_adapter, trainable_parameters

# What AutoPeftModel makes the base with, from the composition that the adapter names.
AUTO_MAPPING = {
    "base_model_class": FlamingoForConditionalGeneration.__name__,
    "parent_library": "flamingo_ft",
}
HOW_IT_WAS_LOADED = (
    "is_local",
    "local_files_only",
)  # tokenizers write these down; they say nothing of the adapter


def save_adapter(
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    folder: str | Path,
    adapter: str = ADAPTER,
    write: bool = True,
) -> None:
    """Write the adapter. Raises RuntimeError, before writing, if a parameter that trains would be missing from it.

    adapter: PEFT's name of the LoRA to write, where the model has several. write: false in all but one of several
    processes, which all have to come here, for the tensors of a sharded model to be gathered.
    """
    folder = Path(folder)
    tensors = {name: whole(tensor) for name, tensor in adapter_tensors(model, adapter).items()}
    check_complete(model, tensors, adapter)
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors, config = _as_plain_lora(model, tensors, adapter)
    contiguous = {PREFIX + name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    with file_in_place(folder / ADAPTER_WEIGHTS) as file:
        save_file(contiguous, file, metadata={"format": "pt"})
    config.save_pretrained(folder)
    _own_config(model).save_pretrained(folder)
    save_processor(processor, folder)
    write_card(folder)


def save_processor(processor: FlamingoProcessor, folder: Path) -> None:
    """Write the processor's files, the same wherever it was loaded from."""
    for key in HOW_IT_WAS_LOADED:
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(folder)


def check_complete(model: FlamingoForConditionalGeneration, tensors: dict[str, Tensor], adapter: str) -> None:
    """Refuse to save less than what trains."""
    lost = sorted({name_in_file(name, adapter) for name in trainable_parameters(model)} - set(tensors))
    if lost:
        raise RuntimeError(
            f"{len(lost)} trained parameters would not be saved, among them {lost[0]}; nothing written"
        )


def _as_plain_lora(
    model: FlamingoForConditionalGeneration, tensors: dict[str, Tensor], adapter: str
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Tensors and configuration that mean the same on the base as it was loaded.

    Updates that took their start A0, B0 out of the base (PiSSA) become B A - B0 A0, a LoRA of twice the rank.
    """
    if not has_lora(model, adapter):
        empty = LoraConfig(base_model_name_or_path=base_name(model), target_modules=DUMMY_TARGET_MODULES)
        return tensors, dataclasses.replace(empty, inference_mode=True, auto_mapping=AUTO_MAPPING)
    # The weights are in the file: nothing is to be made up, or taken out of the base, when it is loaded.
    loaded_as = {"inference_mode": True, "init_lora_weights": True, "auto_mapping": AUTO_MAPPING}
    config = dataclasses.replace(model.peft_config[adapter], **loaded_as)
    start = getattr(model, "initial_lora", None)
    if not start:
        return tensors, config
    doubled = {name: _with_start(name, tensor, start) for name, tensor in tensors.items()}
    twice = {"r": 2 * config.r, "lora_alpha": 2 * config.lora_alpha}
    for key in ("rank_pattern", "alpha_pattern"):
        twice[key] = {part: 2 * value for part, value in getattr(config, key).items()}
    return doubled, dataclasses.replace(config, **twice)


def _with_start(name: str, tensor: Tensor, start: dict[str, Tensor]) -> Tensor:
    if name not in start:
        return tensor
    first = start[name].to(tensor)
    return torch.cat([tensor, first], dim=0) if ".lora_A." in name else torch.cat([tensor, -first], dim=1)


def reset_name_or_path(config: FlamingoConfig) -> None:
    """Leave out in which folder of this machine the language model lay; what it was asked for by stays."""
    config.text_config._name_or_path = ((config.backbones or {}).get("language") or {}).get("name") or ""


def _own_config(model: FlamingoForConditionalGeneration) -> FlamingoConfig:
    """The model's configuration without what the language model's loader left in it: how it was quantized this time."""
    config = FlamingoConfig.from_dict(model.config.to_dict())
    reset_name_or_path(config)
    if ((config.backbones or {}).get("language") or {}).get("quantization"):
        config.text_config.quantization_config = None
    return config


def adapter_tensors(model: FlamingoForConditionalGeneration, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """What an adapter holds, by name: LoRA, and the parts of the bridge that its base does not have."""
    kept = parts_in_adapter(model.config)
    state = model.state_dict()
    bridge = {
        _own_name(model, name, adapter): tensor
        for name, tensor in state.items()
        if in_parts(name, kept) and not is_lora(name)
    }
    # PEFT would look for the vocabulary's original size on the Hub; the token rows have what was added to it.
    has_any = has_lora(model, adapter)
    lora = get_peft_model_state_dict(model, state, adapter, save_embedding_layers=False) if has_any else {}
    return bridge | lora


def _own_name(model: FlamingoForConditionalGeneration, name: str, adapter: str) -> str:
    """A tensor's name where ``adapter`` is the only one: a layer that only others update is plain then."""
    layer, base, leaf = name.partition(".base_layer.")
    return f"{layer}.{leaf}" if base and adapter not in model.get_submodule(layer).r else name


def name_in_file(name: str, adapter: str = ADAPTER) -> str:
    """A parameter's name as PEFT keeps it: without the adapter's own name."""
    if not is_lora(name):
        return name
    plain = name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
    return plain.removesuffix(".weight") if "lora_magnitude_vector" in plain else plain
