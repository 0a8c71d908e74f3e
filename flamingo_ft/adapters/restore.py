"""What trains, put back as a checkpoint has it."""

from __future__ import annotations

from pathlib import Path

import torch

from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.sharding import fill, let_go

from .contents import name_in_file
from .files import read_config, read_tensors
from .trainable import trainable_parameters

BASE = ("backbones", "bridge_init")  # what an adapter's configuration says of the model that it belongs to


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
            raise UserError(f"{folder}: {name} trains, but is not in this adapter; resume with the recipe of its run")
        # Updates that took their start out of the base are kept with that start behind them (`_with_start`).
        stored = stored[tuple(slice(size) for size in parameter.shape)]
        if stored.shape != parameter.shape:
            found = f"{name} has shape {tuple(stored.shape)}, wanted {tuple(parameter.shape)}"
            raise UserError(f"{folder}: {found}; resume with the recipe of its run")
        fill(parameter, stored)


def _check_base(model: FlamingoForConditionalGeneration, folder: Path) -> None:
    stored = read_config(folder)
    for key in BASE:
        if getattr(stored, key) != getattr(model.config, key):
            raise UserError(
                f"{folder}: trained on {getattr(stored, key)}, found {getattr(model.config, key)} ({key}); "
                "restore what it was trained on"
            )
