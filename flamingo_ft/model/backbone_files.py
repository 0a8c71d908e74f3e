"""What is known of a recipe's backbones before their weights are loaded: configs, transform, tokenizer."""

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

from .added_tokens import add_media_tokens
from .processor import FlamingoProcessor


@dataclass(frozen=True)
class BackboneFiles:
    """tower: the config of a `VisionBackbone`; resize_mode: how images are brought to its size; language,
    tokenizer: the language model's configuration and tokenizer.
    """

    tower: dict
    resize_mode: str | None
    language: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def processor(self) -> FlamingoProcessor:
        """Return the processor of the Flamingo with these backbones, as `build_flamingo` makes it."""
        tokenizer = copy.deepcopy(self.tokenizer)
        add_media_tokens(tokenizer)
        with torch.device("meta"):
            preprocess = tower_preprocess(build_visual(self.tower), {}, self.resize_mode)
        return FlamingoProcessor.for_backbones(preprocess, tokenizer)


def backbone_files(model: ModelSection) -> BackboneFiles:
    """Fetch the backbones' files, without weights. Raises UserError for backbones that do not exist."""
    vision, language = model.vision, model.language
    tower = tower_config(vision.name, vision.pretrained, vision.image_size)
    return BackboneFiles(tower, vision.resize_mode, *language_files(language.name, language.revision))


def eos_token_ids(model: ModelSection) -> int | list[int] | None:
    """Return the end-of-sequence ids of the language model's own generation configuration."""
    folder = language_folder(model.language.name, model.language.revision, weights=False)
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder).eos_token_id
    return language_files(model.language.name, model.language.revision)[0].eos_token_id


def text_limit(config: PreTrainedConfig, max_text_tokens: int | None) -> int:
    """Return the longest sample in text tokens: ``max_text_tokens``, at most the model's context length."""
    return min(max_text_tokens or NO_CONTEXT_LIMIT, context_length(config))
