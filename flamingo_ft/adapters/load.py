"""From an adapter's folder to a working model.

The backbones are loaded by the names that the adapter records, and must have the content that it records.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo_ft.model.configuration import FORMAT_VERSION
from flamingo_ft.backbones.device import default_device
from flamingo_ft.model.tokens import grow_vocabulary

from .save import PREFIX, WEIGHTS
from .trainable import bridge_tensors


def load_adapter(folder: str | Path) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The model in eval mode, all of it frozen, on the GPU where there is one, and its processor.

    Raises UserError when the folder is no adapter, the backbones are others than those it was trained on, or its
    weights are missing, damaged or do not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    vision = load_vision(**_names(config.backbones["vision"], "pretrained"))
    language = load_language(**_names(config.backbones["language"]))
    for part, found in (("vision", vision.source), ("language", language.source)):
        check_backbone(folder, part, config.backbones[part], found)
    grow_vocabulary(language.model, config.text_config.vocab_size)
    model = FlamingoForConditionalGeneration(config, vision.visual, language.model)
    load_bridge(model, folder)
    return model.eval().to(default_device()), FlamingoProcessor.from_pretrained(folder)


def _names(source: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """What a backbone's loader is to be asked for."""
    return {key: source[key] for key in ("name", "revision", *more)}


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


def check_backbone(folder: Path, part: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a backbone that is not the one the adapter was trained on."""
    if found["sha256"] != wanted["sha256"]:
        raise UserError(
            f"{folder}: adapter of another base: {part} backbone {wanted['name']} had content {wanted['sha256'][:12]}, "
            f"found {found['sha256'][:12]}; restore the backbone that the adapter was trained on"
        )


def load_bridge(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Put the adapter's tensors in place, each of which must be there and fit."""
    tensors = _read(folder / WEIGHTS)
    targets = bridge_tensors(model)
    _check_names(folder, set(tensors), set(targets))
    with torch.no_grad():
        for name, target in targets.items():
            if tensors[name].shape != target.shape:
                found, wanted = tuple(tensors[name].shape), tuple(target.shape)
                raise UserError(f"{folder}: {name} has shape {found}, wanted {wanted}; the adapter is damaged")
            target.copy_(tensors[name])


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy the adapter again") from None


def _check_names(folder: Path, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        lacking, unknown = sorted(wanted - found), sorted(found - wanted)
        example = (lacking or unknown)[0]
        raise UserError(
            f"{folder}: lacks {len(lacking)} weights of the bridge and has {len(unknown)} unknown ones, "
            f"such as {example}; the adapter is damaged"
        )
