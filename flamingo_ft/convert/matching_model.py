"""Build a model that a foreign checkpoint fits: its backbones, with a bridge of its shape."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from flamingo_ft.adapters.released_models import RELEASED_MODELS, TOWER, ReleasedModel, find_released
from flamingo_ft.backbones.decoder_layers import hidden_size
from flamingo_ft.backbones.language import LanguageBackbone, load_language
from flamingo_ft.backbones.vision import VisionBackbone, load_vision
from flamingo_ft.errors import UserError
from flamingo_ft.formats import ForeignCheckpoint
from flamingo_ft.formats.foreign_checkpoint import (
    OPEN_FLAMINGO,
    OPEN_FLAMINGO_1,
    OTTER,
    BridgeShape,
    bridge_shape,
)
from flamingo_ft.formats.key_names import ANSWER_TOKEN
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor, build_flamingo
from flamingo_ft.model.added_tokens import add_media_tokens


@dataclass(frozen=True)
class Backbones:
    """Names of the backbones as in a recipe's model.language and model.vision; None for unknown ones."""

    language: str | None = None
    vision: str | None = None
    pretrained: str | None = None


def build_matching_model(
    source: str, checkpoint: ForeignCheckpoint, base: ForeignCheckpoint, requested: Backbones
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor, list[str]]:
    """Build a model for a checkpoint on the CPU, with unquantized backbones. Also return notes for the user.

    base: the checkpoint whose bridge it builds on, which may be itself.
    requested: its backbones, as far as they are known.
    """
    shape = bridge_shape(base.bridge, base.path)
    backbones = _resolve_backbones(source, base, shape, requested)
    vision = load_vision(backbones.vision, backbones.pretrained)
    language = load_language(backbones.language, dtype="auto")
    _check_backbones(checkpoint, shape, backbones, vision, language)
    extra_tokens, notes = _extra_tokens(checkpoint, language)
    model, processor = build_flamingo(
        vision,
        language,
        cross_attn_every_n_layers=shape.cross_attn_every_n_layers,
        media_visibility=base.visibility,
        perceiver=shape.perceiver,
        cross_attention=shape.cross_attention,
        extra_tokens=extra_tokens,
    )
    tower = " ".join(filter(None, [backbones.vision, backbones.pretrained]))
    return model, processor, [f"backbones: language model {backbones.language}, tower {tower}", *notes]


@dataclass(frozen=True)
class _KnownBackbones:
    """Names of the backbones that a model is built with."""

    language: str
    vision: str
    pretrained: str | None = None


def _resolve_backbones(
    source: str, checkpoint: ForeignCheckpoint, shape: BridgeShape, requested: Backbones
) -> _KnownBackbones:
    """Complete ``requested`` with the backbones that the checkpoint was trained with.

    The language model follows from the name of a released model or, for OpenFlamingo's, from the shape of the
    bridge. The tower is OpenAI's ViT-L-14, as in all released Flamingos, unless one is requested.

    Raises UserError if the language model is neither requested nor clear.
    """
    if requested.pretrained is not None and requested.vision is None:
        raise UserError(
            f"--pretrained: needs --vision, got only {requested.pretrained}; "
            "name the architecture that it is a tag of"
        )
    language = requested.language
    if language is None:
        language = _find_language(source, checkpoint, shape)
    if requested.vision is None:
        return _KnownBackbones(language, *TOWER)
    return _KnownBackbones(language, requested.vision, requested.pretrained)


def _find_language(source: str, checkpoint: ForeignCheckpoint, shape: BridgeShape) -> str:
    """Return the name of the checkpoint's language model, or raise UserError with the ones that it may be."""
    recorded = (checkpoint.config.get("text_config") or {}).get("_name_or_path")
    by_name = find_released(source)
    if by_name:
        candidates = [by_name]
    elif checkpoint.format in (OPEN_FLAMINGO, OPEN_FLAMINGO_1):
        candidates = [model for model in RELEASED_MODELS if _has_shape(model, checkpoint, shape)]
    else:
        candidates = []
    if len(candidates) == 1 and not recorded:
        return candidates[0].languages[0]
    names = [recorded] if recorded else [model.languages[0] for model in candidates]
    hint = f" (it may be {' or '.join(names)})" if names else ""
    raise UserError(
        f"{source}: the checkpoint's language model is not certain{hint}; name it with --language"
    )


def _has_shape(model: ReleasedModel, checkpoint: ForeignCheckpoint, shape: BridgeShape) -> bool:
    same_layers = checkpoint.decoder_layers in (None, model.layers_path)
    return same_layers and (shape.blocks, shape.lm_width) == (model.blocks, model.width)


def _check_backbones(
    checkpoint: ForeignCheckpoint,
    shape: BridgeShape,
    backbones: _KnownBackbones,
    vision: VisionBackbone,
    language: LanguageBackbone,
) -> None:
    """Refuse backbones whose width or activation is not the checkpoint's."""
    path, width = checkpoint.path, hidden_size(language.model.config)
    if vision.width != shape.vis_dim:
        raise UserError(
            f"{path}: was trained on tower tokens of width {shape.vis_dim}, {backbones.vision} has "
            f"{vision.width}; name its tower with --vision and --pretrained"
        )
    if width != shape.lm_width:
        raise UserError(
            f"{path}: was trained with a language model of width {shape.lm_width}, {backbones.language} has "
            f"{width}; name its language model with --language"
        )
    activation = (checkpoint.config.get("vision_config") or {}).get("hidden_act")
    if activation is not None and ("quick" in activation) != vision.config["quick_gelu"]:
        raise UserError(
            f"{path}: its tower computes with {activation}, {backbones.vision} with another activation; "
            "name its tower with --vision"
        )


def _extra_tokens(
    checkpoint: ForeignCheckpoint, language: LanguageBackbone
) -> tuple[tuple[str, ...], list[str]]:
    """Return the tokens that Otter adds, and notes for the user.

    A tokenizer beside the weights decides; without one, the vocabulary must have a row for the token.
    """
    if checkpoint.format != OTTER:
        return (), []
    tokenizer_files = [file.read_text(encoding="utf-8") for file in checkpoint.path.glob("*token*.json")]
    if tokenizer_files:
        return ((ANSWER_TOKEN,) if any(ANSWER_TOKEN in text for text in tokenizer_files) else ()), []
    tokenizer = copy.deepcopy(language.tokenizer)
    add_media_tokens(tokenizer, (ANSWER_TOKEN,))
    embedding = language.model.get_input_embeddings().weight
    name = next(name for name, parameter in language.model.named_parameters() if parameter is embedding)
    stored = checkpoint.language.get(f"lang_encoder.{name}")
    if stored is not None and len(stored) < len(tokenizer):
        return (), [f"{ANSWER_TOKEN} is left out: the checkpoint's vocabulary has no row for it"]
    return (ANSWER_TOKEN,), [f"{ANSWER_TOKEN} is assumed to be one of its tokens, as in all of Otter"]
