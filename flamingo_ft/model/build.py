"""Build a new Flamingo from two backbones, and read their configurations without weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from flamingo_ft.backbones.decoder_layers import NO_CONTEXT_LIMIT, context_length
from flamingo_ft.backbones.language import LanguageBackbone, language_files, language_folder
from flamingo_ft.backbones.tower import build_visual, tower_preprocess
from flamingo_ft.backbones.vision import VisionBackbone, recipe_tower_config
from flamingo_ft.config import DataSection, ModelSection, Recipe

from .added_tokens import EOC_TOKEN, MEDIA_TOKEN, add_media_tokens, grow_vocabulary, token_id
from .configuration import FlamingoConfig
from .modeling import FlamingoForConditionalGeneration
from .processor import FlamingoProcessor
from .sight import Visibility
from .tile_tags import tile_tag_ids, tile_tags
from .tiles import Tiling


def build_flamingo(
    vision: VisionBackbone,
    language: LanguageBackbone,
    *,
    cross_attn_every_n_layers: int = 1,
    media_visibility: Visibility = "immediate",
    perceiver: Mapping[str, Any] | None = None,
    cross_attention: Mapping[str, Any] | None = None,
    decoder_layers_attr_name: str | None = None,
    extra_tokens: Sequence[str] = (),
    tagged_tiles: int = 0,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Build a Flamingo with a new bridge, and its processor; all parameters are frozen.

    ``<|endofchunk|>``, ``<image>`` and ``extra_tokens`` are added to the tokenizer; their rows can be
    trained. tagged_tiles: most tiles of an image if they have text tags (`tile_tags`), which are added too.
    The other options are those of `FlamingoConfig`. Raises UserError if the language model's decoder
    layers cannot be found.
    """
    lm, tokenizer = language.model, language.tokenizer
    known_rows = len(tokenizer)
    tags = tile_tags(tagged_tiles) if tagged_tiles else []
    new_token_ids = add_media_tokens(tokenizer, [*extra_tokens, *tags])
    grow_vocabulary(lm, len(tokenizer))
    config = FlamingoConfig(
        text_config=lm.config,
        vision_config=vision.config,
        vision_preprocess=vision.preprocess,
        vision_width=vision.width,
        cross_attn_every_n_layers=cross_attn_every_n_layers,
        media_visibility=media_visibility,
        perceiver=dict(perceiver or {}),
        cross_attention=dict(cross_attention or {}),
        media_token_id=token_id(tokenizer, MEDIA_TOKEN),
        eoc_token_id=token_id(tokenizer, EOC_TOKEN),
        tile_tag_ids=[*tile_tag_ids(tokenizer)] or None,
        new_token_ids=new_token_ids,
        decoder_layers_attr_name=decoder_layers_attr_name,
        backbones={"vision": vision.source, "language": language.source},
        licenses={"vision": vision.license, "language": language.license},
    )
    model = FlamingoForConditionalGeneration(config, vision.visual, lm)
    if model.token_rows is not None:
        model.token_rows.reset(lm, known_rows)
        model.token_rows.spell_out(lm, _spellings(tokenizer, tags))
    return model, FlamingoProcessor.for_backbones(vision.preprocess, tokenizer)


def _spellings(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[int, list[int]]:
    """Return the ids of the tokens that spell each of ``tokens``, by its id."""
    return {
        token_id(tokenizer, token): tokenizer(
            token, add_special_tokens=False, split_special_tokens=True
        ).input_ids
        for token in tokens
    }


def recipe_options(recipe: Recipe) -> dict[str, Any]:
    """Return the keyword arguments of `build_flamingo` that a recipe sets."""
    model, tiles = recipe.model, recipe.data.tiles
    perceiver = model.perceiver.model_dump()
    if tiles is not None and tiles.tags == "learned":  # absent otherwise, as in bridges from before tiles
        perceiver["max_tiles"] = tiles.max
    return {
        "cross_attn_every_n_layers": model.cross_attn_every_n_layers,
        "media_visibility": model.media_visibility,
        "perceiver": perceiver,
        "cross_attention": model.cross_attention.model_dump(),
        "decoder_layers_attr_name": model.language.decoder_layers_attr_name,
        "tagged_tiles": tagged_tiles(recipe.data),
    }


def tagged_tiles(data: DataSection) -> int:
    """Return the most tiles of an image if they have text tags, else 0."""
    return data.tiles.max if data.tiles is not None and data.tiles.tags == "text" else 0


def set_media_options(processor: FlamingoProcessor, data: DataSection) -> None:
    """Set how a processor reads videos and large images, as a recipe says."""
    images, tiles = processor.image_processor, data.tiles
    images.video_frames = data.video_frames
    if tiles is not None:
        images.tiles = Tiling(tiles.max, tiles.size, tiles.thumbnail).to_dict()


# --- before the weights are loaded: configurations, image transform, tokenizer ---


@dataclass(frozen=True)
class BackboneFiles:
    """The configurations of a recipe's backbones, and the tokenizer.

    tower: the config of a `VisionBackbone`; resize_mode: how images are brought to its size; language,
    tokenizer: the language model's configuration and tokenizer.
    """

    tower: dict
    resize_mode: str | None
    language: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def processor(self, tagged_tiles: int = 0) -> FlamingoProcessor:
        """Return the processor of the Flamingo with these backbones, as `build_flamingo` makes it."""
        tokenizer = copy.deepcopy(self.tokenizer)
        add_media_tokens(tokenizer, tile_tags(tagged_tiles) if tagged_tiles else ())
        with torch.device("meta"):
            preprocess = tower_preprocess(build_visual(self.tower), {}, self.resize_mode)
        return FlamingoProcessor.for_backbones(preprocess, tokenizer)


def backbone_files(model: ModelSection) -> BackboneFiles:
    """Fetch the backbones' files, without weights. Raises UserError for backbones that do not exist."""
    vision, language = model.vision, model.language
    files = language_files(language.name, language.revision)
    return BackboneFiles(recipe_tower_config(vision), vision.resize_mode, *files)


def eos_token_ids(model: ModelSection) -> int | list[int] | None:
    """Return the end-of-sequence ids of the language model's own generation configuration."""
    folder = language_folder(model.language.name, model.language.revision, weights=False)
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder).eos_token_id
    return language_files(model.language.name, model.language.revision)[0].eos_token_id


def text_limit(config: PreTrainedConfig, max_text_tokens: int | None) -> int:
    """Return the longest sample in text tokens: ``max_text_tokens``, at most the model's context length."""
    return min(max_text_tokens or NO_CONTEXT_LIMIT, context_length(config))
