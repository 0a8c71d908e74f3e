"""An adapter on disk: PEFT's format, holding the bridge.

``adapter_model.safetensors`` has the bridge under PEFT's prefix, so that ``peft.PeftModel.from_pretrained(base, folder)``
puts it in place; ``adapter_config.json`` is a LoRA configuration without a target; ``config.json`` says which
backbones the adapter belongs to; beside them the processor's files and a card.
"""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor

from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .card import write_card
from .trainable import bridge_tensors, trainable_parameters

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, for everything inside the model it wraps
HOW_IT_WAS_LOADED = ("is_local", "local_files_only")  # tokenizers write these down; they say nothing of the adapter


def save_adapter(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, folder: Path) -> None:
    """Write the adapter. Raises RuntimeError, before writing, if a parameter that trains would be missing from it."""
    tensors = bridge_tensors(model)
    check_complete(model, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {PREFIX + name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    _peft_config(model).save_pretrained(folder)
    model.config.save_pretrained(folder)
    for key in HOW_IT_WAS_LOADED:
        processor.tokenizer.init_kwargs.pop(key, None)
    processor.save_pretrained(folder)
    write_card(model, folder)


def check_complete(model: FlamingoForConditionalGeneration, tensors: dict[str, Tensor]) -> None:
    """Refuse to save less than what trains."""
    lost = sorted(set(trainable_parameters(model)) - set(tensors))
    if lost:
        raise RuntimeError(f"{len(lost)} trained parameters would not be saved, among them {lost[0]}; nothing written")


def _peft_config(model: FlamingoForConditionalGeneration) -> LoraConfig:
    backbones = model.config.backbones or {}
    return LoraConfig(
        base_model_name_or_path=(backbones.get("language") or {}).get("name"),
        target_modules=DUMMY_TARGET_MODULES,
        inference_mode=True,
    )
