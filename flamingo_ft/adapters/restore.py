"""What trains, put back as a checkpoint has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoConfig, FlamingoForConditionalGeneration
from flamingo_ft.model.sharding import fill, let_go

from .contents import name_in_file
from .files import read_config, read_tensors
from .trainable import trainable_parameters

PLACES = (
    "name",
    "pretrained",
    "revision",
    "path",
)  # of a base: where it was, which may change; its content may not


@torch.no_grad()
def restore_trainable(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    """Copy an adapter that `save_adapter` wrote of this model into its trainable parameters, to the last bit.

    Raises UserError where the adapter lacks one of them, has it in another shape, or belongs to another base.
    """
    _check_base(model, folder)
    tensors = read_tensors(folder)
    let_go(model)
    for name, parameter in trainable_parameters(model).items():
        stored = tensors.get(name_in_file(name))
        if stored is None:
            raise UserError(
                f"{folder}: {name} trains, but is not in this adapter; resume with the recipe of its run"
            )
        # Updates that took their start out of the base are kept with that start behind them (`_with_start`).
        stored = stored[tuple(slice(size) for size in parameter.shape)]
        if stored.shape != parameter.shape:
            found = f"{name} has shape {tuple(stored.shape)}, wanted {tuple(parameter.shape)}"
            raise UserError(f"{folder}: {found}; resume with the recipe of its run")
        fill(parameter, stored)


def _check_base(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    stored, here = _base_of(read_config(folder)), _base_of(model.config)
    for part, record in stored.items():
        if _content(record) != _content(here[part]):
            raise UserError(
                f"{folder}: trained on {part} {record}, got {here[part]}; restore what it was trained on"
            )


def _base_of(config: FlamingoConfig) -> dict[str, Mapping[str, Any]]:
    """What an adapter's configuration records of each part of the model that it belongs to."""
    parts = {f"{part} backbone": source for part, source in (config.backbones or {}).items()}
    return {"bridge of": config.bridge_init or {}, "vision backbone": {}, "language backbone": {}, **parts}


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what copies of the same content differ in."""
    return {key: value for key, value in record.items() if key not in PLACES}
