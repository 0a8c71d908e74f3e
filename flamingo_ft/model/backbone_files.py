"""What a recipe's backbones tell of themselves before any of their weights are there."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from flamingo_ft.backbones.decoder_layers import NO_CONTEXT_LIMIT, context_length
from flamingo_ft.backbones.language import language_files, language_folder
from flamingo_ft.backbones.tower import build_visual, tower_preprocess
from flamingo_ft.backbones.vision import tower_config
from flamingo_ft.config import ModelSection

from . import FlamingoProcessor
from .added_tokens import add_media_tokens


@dataclass(frozen=True)
class BackboneFiles:
    """tower: a `VisionBackbone.config`, and resize_mode how images are brought to its size; language, tokenizer: the
    language model's."""

    tower: dict
    resize_mode: str | None
    language: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def processor(self) -> FlamingoProcessor:
        """The processor of the Flamingo that they make, as `build_flamingo` gives it."""
        tokenizer = copy.deepcopy(self.tokenizer)
        add_media_tokens(tokenizer)
        with torch.device("meta"):
            preprocess = tower_preprocess(build_visual(self.tower), {}, self.resize_mode)
        return FlamingoProcessor.for_backbones(preprocess, tokenizer)


def backbone_files(model: ModelSection) -> BackboneFiles:
    """Fetch what is not there of them, never weights. UserError for backbones that do not exist."""
    vision, language = model.vision, model.language
    tower = tower_config(vision.name, vision.pretrained, vision.image_size)
    return BackboneFiles(tower, vision.resize_mode, *language_files(language.name, language.revision))


def own_ends(model: ModelSection) -> int | list[int] | None:
    """The tokens with which the language model, as it was released, ends what it generates."""
    folder = language_folder(model.language.name, model.language.revision, weights=False)
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder).eos_token_id
    return language_files(model.language.name, model.language.revision)[0].eos_token_id


def text_limit(config: PreTrainedConfig, wanted: int | None) -> int:
    """Longest sample in text tokens: as wanted, within the context that a model's configuration tells."""
    return min(wanted or NO_CONTEXT_LIMIT, context_length(config))
