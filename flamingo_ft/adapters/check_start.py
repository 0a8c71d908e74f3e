"""Check, before weights are downloaded, that the model a run starts from fits the recipe's backbones.

Released models are recognized by name, other checkpoints by the shapes of their tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from flamingo_ft.backbones.decoder_layers import find_decoder_layers, hidden_size
from flamingo_ft.backbones.language import language_files
from flamingo_ft.backbones.tower import build_visual
from flamingo_ft.backbones.vision import recipe_tower_config, tower_config
from flamingo_ft.backbones.visual_tokens import token_width
from flamingo_ft.config import (
    RELEASED_PERCEIVER,
    CrossAttentionSection,
    LanguageSection,
    ModelSection,
    VisionSection,
)
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint, read_checkpoint
from flamingo_ft.hub.names import NANO, local_language, local_tower, local_weights

from .init_from import is_foreign_checkpoint
from .released_models import RELEASED_MODELS, SAME_TOWER, TOWER, TOWER_WIDTH, ReleasedModel, find_released

_QUERY = re.compile(r"gated_cross_attn_layers\.(\d+)\.attn\.to_q\.weight")
# OpenCLIP's suffix of architectures with QuickGELU; the tag openai exists with and without it
QUICK_GELU = "-quickgelu"


def check_start(section: ModelSection) -> None:
    """Raise UserError if ``init_from`` is a checkpoint that was trained with other backbones.

    Only configuration and tokenizer of backbones on the Hub are downloaded. Adapters and merged models record
    what they belong to, which is checked when they are loaded.
    """
    start = section.init_from
    if start is None:
        return
    if (model := find_released(start)) is not None:
        _check_named(model, section)
    elif is_foreign_checkpoint(start):
        _check_shapes(start, section)


def _check_named(model: ReleasedModel, section: ModelSection) -> None:
    differing = list(_differing_keys(model, section))
    if differing:
        raise UserError(
            f"model.init_from: {model.name} needs {model.required_keys()}; the recipe has "
            f"{', '.join(differing)}"
        )


def _differing_keys(model: ReleasedModel, section: ModelSection) -> Iterator[str]:
    """Yield the recipe keys that differ from what a released model needs."""
    vision = section.vision
    if not _is_its_language(model, section.language):
        yield f"model.language.name {section.language.name}"
    if not _is_its_tower(vision):
        yield f"model.vision {{name: {vision.name}, pretrained: {vision.pretrained or 'null'}}}"
    if section.cross_attn_every_n_layers != model.interval:
        yield f"cross_attn_every_n_layers {section.cross_attn_every_n_layers}"
    if section.media_visibility not in model.visibility:
        yield f"media_visibility {section.media_visibility}"
    for key, sizes in (("perceiver", RELEASED_PERCEIVER), ("cross_attention", CrossAttentionSection())):
        if getattr(section, key) != sizes:
            yield f"other sizes in model.{key} (leave it out)"


def _is_its_language(model: ReleasedModel, section: LanguageSection) -> bool:
    """Compare the language model by its name on the Hub; a local folder by its shape."""
    if section.name != NANO and local_language(section.name, section.revision) is None:
        return section.name.lower() in [name.lower() for name in model.languages]
    shape = _language_shape(section)
    return shape == _LanguageShape(model.layers_path, model.width, model.layers)


def _is_its_tower(section: VisionSection) -> bool:
    """Compare the tower by name; with weights in a file by its architecture; a local folder by its shape."""
    name, pretrained = section.name.replace("/", "-").removesuffix(QUICK_GELU), section.pretrained
    if (name, pretrained) == TOWER or (section.name, pretrained) == SAME_TOWER:
        return True
    if name == TOWER[0] and pretrained and local_weights(pretrained) is not None:
        return True
    if local_tower(section.name, pretrained) is None:
        return False
    theirs, ours = (tower_config(tower)["vision_cfg"] for tower in (TOWER[0], section.name))
    return all(ours.get(key) == theirs[key] for key in ("width", "layers", "patch_size"))


@dataclass(frozen=True)
class _LanguageShape:
    layers_path: str
    width: int
    layers: int


def _language_shape(section: LanguageSection) -> _LanguageShape:
    config, _ = language_files(section.name, section.revision)
    with torch.device("meta"):
        path, layers = find_decoder_layers(
            AutoModelForCausalLM.from_config(config), section.decoder_layers_attr_name
        )
    return _LanguageShape(path, hidden_size(config), len(layers))


@dataclass(frozen=True)
class _BridgeShape:
    """What a bridge was built for.

    layers_path: of the language model's decoder layers, None if unknown; blocks: indices of those with
    cross-attention before them; width: of the decoder layers; tower: width of the tower's patch tokens.
    """

    layers_path: str | None
    blocks: tuple[int, ...]
    width: int
    tower: int

    def __str__(self) -> str:
        layers = f"{self.layers_path or 'decoder layers'} {_first_few(self.blocks)} of width {self.width}"
        return f"cross-attention before {layers} on tower tokens of width {self.tower}"


def _check_shapes(start: Path, section: ModelSection) -> None:
    theirs = _checkpoint_shape(read_checkpoint(start))
    if theirs is None:
        return
    ours = _recipe_shape(section)
    if theirs.layers_path is None:
        ours = dataclasses.replace(ours, layers_path=None)
    if theirs != ours:
        raise UserError(f"model.init_from: {start} has {theirs}; the recipe makes {ours}; {_hint(theirs)}")


def _checkpoint_shape(checkpoint: ForeignCheckpoint) -> _BridgeShape | None:
    """Return the shape of a checkpoint's bridge; None if tensors are missing, which loading reports."""
    matches = ((_QUERY.fullmatch(name), tensor) for name, tensor in checkpoint.bridge.items())
    queries = {int(match[1]): tensor for match, tensor in matches if match}
    latents = checkpoint.bridge.get("perceiver.latents")
    if not queries or latents is None:
        return None
    blocks = tuple(sorted(queries))
    return _BridgeShape(checkpoint.decoder_layers, blocks, queries[blocks[0]].shape[1], latents.shape[1])


def _recipe_shape(section: ModelSection) -> _BridgeShape:
    language, every = _language_shape(section.language), section.cross_attn_every_n_layers
    with torch.device("meta"):
        tower = token_width(build_visual(recipe_tower_config(section.vision)))
    return _BridgeShape(
        language.layers_path, tuple(range(every - 1, language.layers, every)), language.width, tower
    )


def _hint(shape: _BridgeShape) -> str:
    """Return the released models of this shape, and what they need."""
    similar = [model for model in RELEASED_MODELS if _has_shape(model, shape)]
    if not similar:
        return "name the language model, the tower and the interval that it was trained with"
    names = " or ".join(f"{model.name} (language model {model.languages[0]})" for model in similar)
    interval = similar[0].interval
    return f"{names} has this geometry, with tower {' '.join(TOWER)} and cross_attn_every_n_layers {interval}"


def _has_shape(model: ReleasedModel, shape: _BridgeShape) -> bool:
    if shape.layers_path not in (None, model.layers_path):
        return False
    return (shape.blocks, shape.width, shape.tower) == (model.blocks, model.width, TOWER_WIDTH)


def _first_few(numbers: Iterable[int]) -> str:
    first, *others = numbers
    return ", ".join(map(str, [first, *others[:2]])) + (", ..." if len(others) > 2 else "")
