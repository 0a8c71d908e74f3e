"""The files of an adapter: PEFT's configuration and weights, the Flamingo's configuration beside them."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoConfig
from flamingo_ft.model.configuration import FORMAT_VERSION

WEIGHTS = "adapter_model.safetensors"
LORA_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's, for everything inside the model it wraps


def read_config(folder: Path) -> FlamingoConfig:
    """The adapter's configuration, checked to be one that this version reads."""
    missing = [name for name in ("config.json", WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: not an adapter, {' and '.join(missing)} not found; give the folder a run wrote")
    config = FlamingoConfig.from_pretrained(folder)
    if config.format_version > FORMAT_VERSION:
        raise UserError(
            f"{folder}: format version {config.format_version} is newer than this package reads ({FORMAT_VERSION}); "
            "upgrade flamingo_ft"
        )
    return config


def read_lora_config(folder: Path) -> LoraConfig | None:
    """PEFT's configuration of an adapter with LoRA; None for a bridge alone."""
    if not (folder / LORA_CONFIG).is_file():
        raise UserError(f"{folder}: not an adapter, {LORA_CONFIG} not found; give the folder a run wrote")
    config = LoraConfig.from_pretrained(str(folder))
    return None if config.target_modules == DUMMY_TARGET_MODULES else config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors under the model's names."""
    path = folder / WEIGHTS
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy the adapter again") from None
