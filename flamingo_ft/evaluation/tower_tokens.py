"""The frozen tower's tokens of images, for the probe; the language model's weights are never loaded.

Shapes: F frames, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.backbones.language import language_files
from flamingo_ft.backbones.precision import frozen_dtype
from flamingo_ft.backbones.vision import VisionBackbone, load_recipe_vision
from flamingo_ft.config import Recipe
from flamingo_ft.data import Sample
from flamingo_ft.data.feature_cache import (
    FeatureCache,
    FrozenTower,
    collate_frames,
    open_tower_cache,
)
from flamingo_ft.data.media import CachedFeatureLoader, load_pixels
from flamingo_ft.data.sample import Medium
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.added_tokens import add_media_tokens
from flamingo_ft.model.build import set_media_options
from flamingo_ft.progress import progress_bars

IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class TowerTokens:
    """Tokens of images by medium, averaged over the views of a tiled image and over the frames of a video.

    mean: (D,), in float32, of the tokens before they are rounded. tokens: (V, D), in bfloat16. Media that
    cannot be read are in neither.
    """

    mean: dict[Medium, Tensor]
    tokens: dict[Medium, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """V and D."""
        first = next(iter(self.tokens.values()))
        return first.shape[0], first.shape[1]


def read_tokens(recipe: Recipe, media: Mapping[Medium, str], autocast: torch.dtype | None) -> TowerTokens:
    """Encode images with the recipe's frozen tower, or look them up in ``data.cache``, if it is set.

    Args:
        media: distinct images and videos, each with the row that it is from, for error messages.
        autocast: dtype that the trainer computes in, on which cached tokens depend.

    Raises:
        UserError: the tower cannot be loaded, or an image cannot be read and data.on_bad_sample is error.
    """
    vision = load_recipe_vision(recipe.model.vision, frozen_dtype(autocast))
    reader = _Reader(vision, recipe, autocast)
    found = TowerTokens({}, {})
    with progress_bars(stderr=True) as progress:
        bar = progress.add_task("encoding images", total=len(media), note="")
        for batch in _batches(list(media)):
            for medium, tokens in reader.encode({medium: media[medium] for medium in batch}).items():
                found.mean[medium], found.tokens[medium] = tokens.mean(0), tokens.bfloat16()
            progress.advance(bar, len(batch))
    return found


def _batches(media: Sequence[Medium]) -> Iterator[Sequence[Medium]]:
    for start in range(0, len(media), IMAGES_AT_ONCE):
        yield media[start : start + IMAGES_AT_ONCE]


class _Reader:
    """Encodes media with the frozen tower, or looks them up in ``cache``.

    skip_unreadable: leave out media that cannot be read instead of raising UserError.
    """

    def __init__(self, vision: VisionBackbone, recipe: Recipe, autocast: torch.dtype | None):
        _, tokenizer = language_files(recipe.model.language.name, recipe.model.language.revision)
        add_media_tokens(tokenizer)
        self.processor = FlamingoProcessor.for_backbones(vision.preprocess, tokenizer)
        set_media_options(self.processor, recipe.data)
        self.skip_unreadable = recipe.data.on_bad_sample == "skip"
        self.cache: FeatureCache | None = None
        if recipe.data.cache is None:
            self.tower = FrozenTower(vision.visual, torch.float32, autocast)
        else:
            preprocess = self.processor.image_processor.transform_record
            self.cache = open_tower_cache(
                vision.visual, vision.source, vision.config, preprocess, recipe.data.cache, autocast=autocast
            )
            self.tower = self.cache.tower

    def encode(self, media: Mapping[Medium, str]) -> dict[Medium, Tensor]:
        """Return the tokens (V, D) of each medium that can be read, on the CPU, in float32."""
        opened = {}
        for medium, where in media.items():
            try:
                opened[medium] = self._open(medium, where)
            except UserError:
                if not self.skip_unreadable:
                    raise
        frames = self._encode(list(opened.values())) if opened else []
        return {medium: tokens.float().mean(0).cpu() for medium, tokens in zip(opened, frames, strict=True)}

    def _open(self, medium: Medium, where: str) -> Any:
        """Return a medium's `Views` or, with a cache, its `Frames`."""
        if self.cache is None:
            return load_pixels(self.processor, medium, where)
        loader = CachedFeatureLoader(self.processor, self.cache.store)
        return loader(Sample([], [medium], "", where), 1, 0)[0]

    def _encode(self, media: Sequence[Any]) -> list[Tensor]:
        """Return the tokens (F, V, D) of each medium."""
        if self.cache is None:
            pixels = [medium.values for medium in media]
            return list(self.tower.encode(torch.cat(pixels)).split([*map(len, pixels)]))
        tokens = self.cache.complete(collate_frames([media]))["vision_tokens"][0]
        return [own[: len(medium.frames)] for own, medium in zip(tokens, media, strict=True)]
