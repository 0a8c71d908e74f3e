"""In which recipe keys a run differs from what it starts from, so that one bridge would not fit both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flamingo_ft.config.yaml_document import yaml_line
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoConfig, FlamingoImageProcessor
from flamingo_ft.model.tiles import Tiling

from .tile_checks import tiling_of

MODEL_KEYS = ("cross_attn_every_n_layers", "media_visibility")
WITHOUT_LAYERS = ("depth", "max_num_media", "max_num_frames", "max_tiles")  # that a perceiver of depth 0 uses


class Difference(NamedTuple):
    """A recipe key with the value that the start was trained with, and with the recipe's."""

    key: str
    theirs: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.key} {_text(self.theirs)} (the recipe has {_text(self.ours)})"


def check_same_settings(
    config: FlamingoConfig, start_config: FlamingoConfig, start: Path, images: FlamingoImageProcessor | None
) -> None:
    """Raise UserError, naming all keys that differ, unless the bridge of ``start`` fits the model.

    images: of the model; None to leave out how images are divided into tiles.
    """
    differences = [*_tile_differences(config, start_config, start, images)]
    named_tiles = bool(differences)
    differences += _model_differences(config, start_config, named_tiles)
    if differences:
        raise UserError(
            f"model.init_from: {start} was trained with {', '.join(map(str, differences))}; "
            "give the recipe the same"
        )


def tile_tags(config: FlamingoConfig) -> str:
    """Return the value of ``data.tiles.tags`` that a model has the parameters for."""
    if config.tile_tag_ids:
        return "text"
    return "learned" if "max_tiles" in (config.perceiver or {}) else "none"


def _tile_differences(
    config: FlamingoConfig, start_config: FlamingoConfig, start: Path, images: FlamingoImageProcessor | None
) -> Iterator[Difference]:
    """Compare tiles and how their places are learned; the start may be without tiles."""
    ours, theirs = tile_tags(config), tile_tags(start_config)
    if images is not None:
        trained = tiling_of(start)
        if trained is not None and trained != images.tiling:
            yield Difference("data.tiles", _tile_values(trained), _tile_values(images.tiling))
            if images.tiling is None:
                return
    if ours != theirs and (theirs, ours) != ("none", "learned"):
        yield Difference("data.tiles.tags", theirs, ours)


def _model_differences(
    config: FlamingoConfig, start_config: FlamingoConfig, named_tiles: bool
) -> Iterator[Difference]:
    """Compare all but tiles. named_tiles: these differ, so that what follows from them is not named."""
    for key in MODEL_KEYS:
        ours, theirs = getattr(config, key), getattr(start_config, key)
        if ours != theirs:
            yield Difference(f"model.{key}", theirs, ours)
    ours, theirs = dict(config.perceiver or {}), dict(start_config.perceiver or {})
    ours_tiles, their_tiles = ours.pop("max_tiles", None), theirs.pop("max_tiles", None)
    if their_tiles is not None and ours_tiles != their_tiles and not named_tiles:
        yield Difference("data.tiles.max", their_tiles, ours_tiles)
    yield from _section_differences("model.perceiver", _used(theirs), ours)
    yield from _section_differences(
        "model.cross_attention", start_config.cross_attention or {}, config.cross_attention or {}
    )
    if config.new_token_ids != start_config.new_token_ids and not named_tiles:
        yield Difference("new tokens", start_config.new_token_ids, config.new_token_ids)


def _used(perceiver: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of a perceiver that have an effect: without layers, it has no sizes."""
    if perceiver.get("depth", 1):
        return perceiver
    return {key: value for key, value in perceiver.items() if key in WITHOUT_LAYERS}


def _section_differences(
    name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> Iterator[Difference]:
    for key, value in theirs.items():
        if ours.get(key) != value:
            yield Difference(f"{name}.{key}", value, ours.get(key))


def _tile_values(tiling: Tiling | None) -> dict[str, Any] | None:
    """Return tiles as a recipe has them, without their tags."""
    if tiling is None:
        return None
    return {"max": tiling.max_tiles, "size": tiling.tile_pixels or "auto", "thumbnail": tiling.thumbnail}


def _text(value: Any) -> str:
    """Return a value as a recipe has it."""
    if isinstance(value, Mapping):
        return yaml_line(value)
    return "null" if value is None else str(value)
