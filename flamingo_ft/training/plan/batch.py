"""The batch that a run has to have room for: its longest samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.config import Recipe
from flamingo_ft.data import Sample, read_samples
from flamingo_ft.data.encode import encode, text_of
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor

CANDIDATES = 256  # samples that look longest, whose tokens are counted
TURN = 24  # characters that a chat template writes around a message, about


@dataclass(frozen=True)
class Batch:
    """samples texts of text_tokens tokens each, with images images of (3, height, width) to a sample.

    where_from: how text_tokens was found.
    """

    samples: int
    text_tokens: int
    images: int
    image_size: tuple[int, int]
    where_from: str = "as given"

    def tensors(self) -> dict[str, Tensor]:
        """A batch as the collator makes it: ids, mask and labels (B, T), pixels (B, M, 3, H, W)."""
        text = {name: torch.zeros(self.samples, self.text_tokens, dtype=torch.long) for name in TEXT}
        if not self.images:
            return text
        return text | {"pixel_values": torch.zeros(self.samples, self.images, 3, *self.image_size)}


TEXT = ("input_ids", "attention_mask", "labels")


def longest(recipe: Recipe, processor: FlamingoProcessor, limit: int) -> tuple[int, int, str] | None:
    """Text tokens and images of the recipe's longest samples, and where they were found; None without its files."""
    if not all(source.path.is_file() for source in recipe.data.train):
        return None
    samples = [sample for source in recipe.data.train for sample in read_samples(source.path, source.image_root)]
    likely = sorted(samples, key=_length)[-CANDIDATES:]
    tokens = max(len(encode(processor, sample.messages).input_ids) for sample in likely)
    return min(tokens, limit), max(len(sample.images) for sample in samples), "the longest of the data"


def find_batch(
    recipe: Recipe,
    processor: FlamingoProcessor,
    image_size: int | tuple[int, int],
    limit: int,
    given: Mapping[str, Any],
) -> Batch:
    """The recipe's batch: sizes as ``given`` ("text_tokens", "images"), else of its data, else the limit and one image.

    Raises UserError when there is neither data nor a limit.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    tokens, images, where_from = given.get("text_tokens"), given.get("images"), "as given"
    if tokens is None or images is None:
        found = longest(recipe, processor, limit) or (limit, 1, "the limit")
        where_from = found[2] if tokens is None else where_from
        tokens, images = (own if own is not None else other for own, other in zip((tokens, images), found, strict=False))
    if tokens >= 2**31:
        raise UserError("data.max_text_tokens: found neither data nor a limit to plan for; set it, or --text-tokens")
    return Batch(recipe.train.batch_size, tokens, images, size, where_from)


def _length(sample: Sample) -> int:
    """In characters, about."""
    return sum(len(text_of(message)) + TURN for message in sample.messages)
