"""How the models that meet divide images into tiles, and whether the places of tiles are learned."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import PROCESSOR_NAME

from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.tiles import Tiling

from .files import read_processor


def tiling_of(folder: Path) -> Tiling | None:
    """Return how an adapter or a whole model divides images into tiles.

    None if it does not, and for a file or another Flamingo's checkpoint.
    """
    has_processor = (folder / PROCESSOR_NAME).is_file()
    return read_processor(folder).image_processor.tiling if has_processor else None


def check_places_are_learned(model: FlamingoForConditionalGeneration) -> None:
    """Raise UserError for places of tiles that a bridge from before tiles lacks, and that are not trained."""
    places = model.perceiver.tile_embs
    if places is not None and not places.requires_grad and not places.any():
        raise UserError(
            "data.tiles.tags: the bridge of model.init_from was trained without tiles, and their places "
            "cannot be learned with trainable.perceiver false; set it to true, or data.tiles.tags to none"
        )
