"""The files of an adapter: PEFT's configuration and weights, the Flamingo's configuration beside them."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_FILE
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.model import FlamingoConfig, FlamingoProcessor
from flamingo_ft.model.configuration import FORMAT_VERSION
from flamingo_ft.model.parts import named_composition

BRIDGE_FILE = "bridge.safetensors"  # beside a composition: the bridge that adapters of it build on
PREFIX = "base_model.model."  # PEFT's, for everything inside the model it wraps

# What json, transformers and PEFT raise for files that are missing, cut or of another kind.
DAMAGED = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)


def read_config(folder: Path) -> FlamingoConfig:
    """The adapter's configuration, checked to be one that this version reads."""
    missing = [name for name in (CONFIG_FILE, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: not an adapter, {' and '.join(missing)} not found; give the folder a run wrote"
        )
    config = read_flamingo_config(folder)
    if config.format_version > FORMAT_VERSION:
        raise UserError(
            f"{folder}: format version {config.format_version} is newer than this package reads ({FORMAT_VERSION}); "
            "upgrade flamingo_ft"
        )
    return config


def read_flamingo_config(folder: Path) -> FlamingoConfig:
    """The configuration of an adapter or a whole model. UserError where it is damaged, or another model's."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if values["model_type"] != FlamingoConfig.model_type:
            raise UserError(
                f"{folder}: holds a {values['model_type']} model; give the folder that a run or a merge wrote"
            )
        return FlamingoConfig.from_pretrained(folder)
    except UserError:
        raise
    except DAMAGED as error:
        reraise_machine_error(error)
        raise UserError(
            f"{folder}: {CONFIG_FILE} is damaged ({error_message(error)}); copy the folder again"
        ) from None


def read_processor(folder: Path) -> FlamingoProcessor:
    """The processor beside an adapter or a whole model. UserError where its files are missing or damaged."""
    try:
        return FlamingoProcessor.from_pretrained(folder)
    except DAMAGED as error:
        reraise_machine_error(error)
        raise UserError(
            f"{folder}: the processor does not load ({error_message(error)}); copy the folder again"
        ) from None


def read_lora_config(folder: Path) -> LoraConfig | None:
    """PEFT's configuration of an adapter with LoRA; None for a bridge alone."""
    config = _read_peft_config(folder)
    return None if config.target_modules == DUMMY_TARGET_MODULES else config


def read_base_name(folder: Path) -> str | None:
    """The composition that an adapter names as its base; None where it names its language model, by whatever path."""
    return _read_peft_config(folder).base_model_name_or_path if named_composition(folder) else None


def _read_peft_config(folder: Path) -> LoraConfig:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: not an adapter, {ADAPTER_CONFIG} not found; give the folder a run wrote")
    try:
        return LoraConfig.from_pretrained(str(folder))
    except DAMAGED as error:
        reraise_machine_error(error)
        raise UserError(
            f"{folder}: {ADAPTER_CONFIG} is damaged ({error_message(error)}); copy the adapter again"
        ) from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors under the model's names."""
    return {
        name.removeprefix(PREFIX): tensor for name, tensor in read_bridge(folder / ADAPTER_WEIGHTS).items()
    }


def read_bridge(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. UserError where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        reraise_machine_error(error)
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); copy the adapter again"
        ) from None
