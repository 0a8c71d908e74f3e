"""Check that images are divided into tiles as the models that meet were trained to see them."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import PROCESSOR_NAME

from flamingo_ft.config.yaml_document import yaml_line
from flamingo_ft.errors import UserError
from flamingo_ft.hub import fetch_model
from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.tiles import Tiling

from .files import read_processor


def check_start_tiles(start: str | Path, ours: Tiling | None) -> None:
    """Raise UserError if ``start`` was trained with other tiles than ``ours``; it may be without any."""
    trained = tiling_of(fetch_model(start))
    if trained is not None and trained != ours:
        raise UserError(
            f"model.init_from: {start} was trained with data.tiles {_text(trained)}, "
            f"the recipe has {_text(ours)}; give the recipe the same"
        )


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


def _text(tiling: Tiling | None) -> str:
    """Return tiles as a recipe has them, without their tags: `{max: 4, size: auto, thumbnail: true}`."""
    if tiling is None:
        return "null"
    size = tiling.tile_pixels or "auto"
    return yaml_line({"max": tiling.max_tiles, "size": size, "thumbnail": tiling.thumbnail})
