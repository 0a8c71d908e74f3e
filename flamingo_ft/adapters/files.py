"""Read an adapter's files, and find the local backbones that its configuration names.

A run records absolute paths of local backbones, so its adapter loads from any directory. Earlier versions
recorded paths as the recipe had them, relative to the directory that the run was started in: any folder above
the adapter.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo_ft.backbones.tower_source import is_architecture
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message
from flamingo_ft.hub.names import LOCAL_DIR, NANO, ON_HUB, TIMM, is_model_folder, looks_like_path
from flamingo_ft.hub.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_FILE
from flamingo_ft.machine_errors import reraise_machine_error
from flamingo_ft.model import FlamingoConfig, FlamingoProcessor
from flamingo_ft.model.configuration import FORMAT_VERSION
from flamingo_ft.model.parts import BRIDGE
from flamingo_ft.model.pretrained import named_composition

from .compat import DUMMY_TARGET_MODULES

BRIDGE_FILE = "bridge.safetensors"  # in a composition: the bridge that its adapters build on
PREFIX = "base_model.model."  # PEFT's prefix for the keys of the model that it wraps

# What json, transformers and PEFT raise for files that are missing, truncated or of another kind.
DAMAGED = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)


def read_config(folder: Path) -> FlamingoConfig:
    """Read an adapter's configuration.

    Raises UserError if it is missing, damaged, or of a newer format version.
    """
    missing = [name for name in (CONFIG_FILE, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: not an adapter, {' and '.join(missing)} not found; give the folder that a run wrote"
        )
    config = read_flamingo_config(folder)
    if config.format_version > FORMAT_VERSION:
        raise UserError(
            f"{folder}: format version {config.format_version} is newer than this package reads "
            f"({FORMAT_VERSION}); upgrade flamingo_ft"
        )
    return config


def read_flamingo_config(folder: Path) -> FlamingoConfig:
    """Read the configuration of an adapter or a whole model.

    Raises UserError if it is damaged or another model's.
    """
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


def backbone_records(config: FlamingoConfig) -> dict[str, dict[str, Any]]:
    """Return what a configuration records of ``vision`` and ``language``; {} if it names no backbones."""
    return config.backbones or {}


def parts_in_adapter(config: FlamingoConfig) -> list[str]:
    """Return the parts of the bridge that the adapter holds; all of a bridge trained from scratch."""
    return list(BRIDGE) if config.adapter_parts is None else config.adapter_parts


def read_processor(folder: Path) -> FlamingoProcessor:
    """Read the processor of an adapter or a whole model.

    Raises UserError if its files are missing or damaged.
    """
    try:
        return FlamingoProcessor.from_pretrained(folder)
    except DAMAGED as error:
        reraise_machine_error(error)
        raise UserError(
            f"{folder}: the processor does not load ({error_message(error)}); copy the folder again"
        ) from None


def read_lora_config(folder: Path) -> LoraConfig | None:
    """Read PEFT's configuration of an adapter; None if the adapter has no LoRA."""
    config = _read_peft_config(folder)
    return None if config.target_modules == DUMMY_TARGET_MODULES else config


def read_base_name(folder: Path) -> str | None:
    """Return the composition that an adapter names as its base; None if it names its language model."""
    return _read_peft_config(folder).base_model_name_or_path if named_composition(folder) else None


def _read_peft_config(folder: Path) -> LoraConfig:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder}: not an adapter, {ADAPTER_CONFIG} not found; give the folder that a run wrote"
        )
    try:
        return cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    except DAMAGED as error:
        reraise_machine_error(error)
        raise UserError(
            f"{folder}: {ADAPTER_CONFIG} is damaged ({error_message(error)}); copy the adapter again"
        ) from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read an adapter's tensors, by their names in the model."""
    tensors = read_safetensors(folder / ADAPTER_WEIGHTS)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises UserError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        reraise_machine_error(error)
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); copy the adapter again"
        ) from None


def candidate_paths(folder: Path, recorded: str) -> list[Path]:
    """Return where to look for a path that the adapter in ``folder`` recorded, the likeliest place first."""
    path = Path(os.path.expanduser(recorded.removeprefix(LOCAL_DIR)))
    adapter = folder.resolve()
    above = [] if path.is_absolute() else [parent / path for parent in adapter.parents]
    return list(dict.fromkeys([path, adapter.parent / path.name, *above]))


def resolve_local_backbones(folder: Path, config: FlamingoConfig) -> FlamingoConfig:
    """Return a copy of an adapter's configuration with the current absolute paths of local backbones.

    Raises UserError, with the places that were searched, for a folder or file that is in none of them.
    """
    config = copy.deepcopy(config)
    for part, record in backbone_records(config).items():
        record |= _current_paths(folder, part, record)
    return config


def _current_paths(folder: Path, part: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a backbone's record that differ now."""
    current: dict[str, Any] = {}
    if _is_local_folder(part, source):
        path = _find(folder, part, source["name"], is_model_folder)
        current = {"name": str(path.absolute()), "revision": None}
    if _has_local_weights(part, source):
        current["pretrained"] = str(_find(folder, part, source["pretrained"], os.path.isfile).absolute())
    return current


def _is_local_folder(part: str, source: Mapping[str, Any]) -> bool:
    """Return whether a backbone is a folder on this machine. One from the Hub is recorded with its commit."""
    name = source["name"]
    if name == NANO or name.startswith(ON_HUB) or (part == "vision" and name.startswith(TIMM)):
        return False
    if looks_like_path(name):
        return True
    return source.get("revision") is None and not (part == "vision" and is_architecture(name))


def _has_local_weights(part: str, source: Mapping[str, Any]) -> bool:
    """Return whether the weights of a tower are a file on this machine."""
    return part == "vision" and bool(source.get("pretrained")) and looks_like_path(source["pretrained"])


def _find(folder: Path, part: str, recorded: str, accepts: Callable[[Path], bool]) -> Path:
    candidates = candidate_paths(folder, recorded)
    for path in candidates:
        if accepts(path):
            return path
    searched = ", ".join(str(path.absolute()) for path in candidates)
    raise UserError(
        f"{folder}: {part} backbone {recorded} is not there (looked at {searched}); "
        "put it back, or beside the adapter"
    )
