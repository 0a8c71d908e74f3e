"""The backbones that a checkpoint was trained with: as said, as its name says, or as its shapes leave no other choice."""

from __future__ import annotations

from dataclasses import dataclass

from flamingo_ft.adapters.released_models import MODELS, TOWER, ReleasedModel, released
from flamingo_ft.errors import UserError
from flamingo_ft.formats import Checkpoint
from flamingo_ft.formats.geometry import Geometry
from flamingo_ft.formats.recognise import OPEN_FLAMINGO, OPEN_FLAMINGO_1


@dataclass(frozen=True)
class Backbones:
    """Names of both, as a recipe's ``model.language`` and ``model.vision`` have them; None for what is not known."""

    language: str | None = None
    vision: str | None = None
    pretrained: str | None = None


def backbones_for(source: str, checkpoint: Checkpoint, shape: Geometry, wanted: Backbones) -> Backbones:
    """Complete what is ``wanted``. The tower is OpenAI's ViT-L-14, as of all released Flamingos, unless it is named.

    Raises UserError where the language model is not named and the checkpoint does not tell which.
    """
    named, theirs = released(source), checkpoint.format in (OPEN_FLAMINGO, OPEN_FLAMINGO_1)
    if wanted.pretrained is not None and wanted.vision is None:
        raise UserError(
            f"found --pretrained {wanted.pretrained} without --vision; name the tower that it is a tag of"
        )
    if wanted.language is None:
        alike = (
            [named]
            if named
            else [model for model in MODELS if theirs and _has_shape(model, checkpoint, shape)]
        )
        wanted = Backbones(_the_only(source, alike, checkpoint), wanted.vision, wanted.pretrained)
    if wanted.vision is not None:
        return wanted
    return Backbones(wanted.language, *TOWER)


def _the_only(source: str, alike: list[ReleasedModel], checkpoint: Checkpoint) -> str:
    told = (checkpoint.config.get("text_config") or {}).get("_name_or_path")
    if len(alike) == 1 and not told:
        return alike[0].languages[0]
    names = [told] if told else [model.languages[0] for model in alike]
    hint = f"; it may be {' or '.join(names)}" if names else ""
    raise UserError(
        f"{source}: the checkpoint does not tell its language model for certain{hint}: name it with --language"
    )


def _has_shape(model: ReleasedModel, checkpoint: Checkpoint, shape: Geometry) -> bool:
    same_layers = checkpoint.layers in (None, model.layers_path)
    return same_layers and (shape.blocks, shape.width) == (model.blocks, model.width)
