"""Whether what a run starts from goes with its backbones: asked of names and configurations, before weights are there.

Released models are known by their names, other checkpoints by the shapes of their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from flamingo_ft.backbones.decoder_layers import find_decoder_layers, hidden_size
from flamingo_ft.backbones.language import language_files
from flamingo_ft.backbones.tower import build_visual, token_width
from flamingo_ft.backbones.vision import tower_config
from flamingo_ft.config import (
    CrossAttentionSection,
    LanguageSection,
    ModelSection,
    PerceiverSection,
    VisionSection,
)
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint, read_checkpoint
from flamingo_ft.hub.names import NANO, local_language, local_tower, local_weights

from .init_from import is_foreign_checkpoint
from .released_models import MODELS, SAME_TOWER, TOWER, TOWER_WIDTH, ReleasedModel, released

_QUERY = re.compile(r"gated_cross_attn_layers\.(\d+)\.attn\.to_q\.weight")
QUICK_GELU = (
    "-quickgelu"  # what OpenCLIP calls an architecture with it, which tag openai has under both names
)


def check_start(section: ModelSection) -> None:
    """Refuse a released model, or a checkpoint's file, that was trained with another model than the recipe's.

    Of backbones on the Hub no more than configuration and tokenizer is fetched. Adapters and merged models say
    themselves what they belong to, when they are loaded. Raises UserError that names what the start needs.
    """
    start = section.init_from
    if start is None:
        return
    if (model := released(start)) is not None:
        _check_named(model, section)
    elif is_foreign_checkpoint(start):
        _check_shapes(start, section)


def _check_named(model: ReleasedModel, section: ModelSection) -> None:
    wrong = list(_departures(model, section))
    if wrong:
        raise UserError(
            f"model.init_from: {model.name} goes with {model.needs()}; the recipe has {', '.join(wrong)}"
        )


def _departures(model: ReleasedModel, section: ModelSection) -> Iterator[str]:
    """What a recipe says otherwise than a released model needs."""
    vision = section.vision
    if not _is_its_language(model, section.language):
        yield f"model.language.name {section.language.name}"
    if not _is_its_tower(vision):
        yield f"model.vision {{name: {vision.name}, pretrained: {vision.pretrained or 'null'}}}"
    if section.cross_attn_every_n_layers != model.interval:
        yield f"cross_attn_every_n_layers {section.cross_attn_every_n_layers}"
    if section.media_visibility not in model.visibility:
        yield f"media_visibility {section.media_visibility}"
    for key, sizes in (("perceiver", PerceiverSection()), ("cross_attention", CrossAttentionSection())):
        if getattr(section, key) != sizes:
            yield f"sizes of its own in model.{key} (leave it out)"


def _is_its_language(model: ReleasedModel, section: LanguageSection) -> bool:
    """By name on the Hub; a copy in a folder, by its shape."""
    if section.name != NANO and local_language(section.name, section.revision) is None:
        return section.name.lower() in [name.lower() for name in model.languages]
    shape = _language_shape(section)
    return shape == _LanguageShape(model.layers_path, model.width, model.layers)


def _is_its_tower(section: VisionSection) -> bool:
    """By name; weights in a file by the name of the architecture, a copy in a folder by its shape."""
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
class _Shape:
    """layers_path: where the language model's decoder layers are, None where no name tells; blocks: those with
    cross-attention before them; width: theirs; tower: width of the tower's tokens."""

    layers_path: str | None
    blocks: tuple[int, ...]
    width: int
    tower: int

    def __str__(self) -> str:
        layers = f"{self.layers_path or 'decoder layers'} {_some(self.blocks)} of width {self.width}"
        return f"cross-attention before {layers} on tower tokens of width {self.tower}"


def _check_shapes(start: Path, section: ModelSection) -> None:
    found = _shape_of(read_checkpoint(start))
    if found is None:
        return
    ours = _recipe_shape(section)
    if found.layers_path is None:
        ours = _Shape(None, ours.blocks, ours.width, ours.tower)
    if found != ours:
        raise UserError(f"model.init_from: {start} has {found}; the recipe makes {ours}; {_hint(found)}")


def _shape_of(checkpoint: ForeignCheckpoint) -> _Shape | None:
    """None where the file holds no bridge that shows it: what loads it tells what it lacks."""
    matches = ((_QUERY.fullmatch(name), tensor) for name, tensor in checkpoint.bridge.items())
    queries = {int(match[1]): tensor for match, tensor in matches if match}
    latents = checkpoint.bridge.get("perceiver.latents")
    if not queries or latents is None:
        return None
    blocks = tuple(sorted(queries))
    return _Shape(checkpoint.decoder_layers, blocks, queries[blocks[0]].shape[1], latents.shape[1])


def _recipe_shape(section: ModelSection) -> _Shape:
    language, every = _language_shape(section.language), section.cross_attn_every_n_layers
    with torch.device("meta"):
        tower = token_width(build_visual(tower_config(section.vision.name, section.vision.pretrained)))
    return _Shape(
        language.layers_path, tuple(range(every - 1, language.layers, every)), language.width, tower
    )


def _hint(found: _Shape) -> str:
    """The released models of these shapes, and what they need."""
    alike = [model for model in MODELS if _has_shape(model, found)]
    if not alike:
        return "name the language model, the tower and the interval that it was trained with"
    names = " or ".join(f"{model.name} (language model {model.languages[0]})" for model in alike)
    return f"{names} has this geometry, with tower {' '.join(TOWER)} and cross_attn_every_n_layers {alike[0].interval}"


def _has_shape(model: ReleasedModel, found: _Shape) -> bool:
    if found.layers_path not in (None, model.layers_path):
        return False
    return (found.blocks, found.width, found.tower) == (model.blocks, model.width, TOWER_WIDTH)


def _some(numbers: Iterable[int]) -> str:
    first, *others = numbers
    return ", ".join(map(str, [first, *others[:2]])) + (", ..." if len(others) > 2 else "")
