"""The batch that a run has to have room for: its longest samples."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.backbones.decoder_layers import NO_CONTEXT_LIMIT
from flamingo_ft.config import Recipe
from flamingo_ft.config.paths import path_exists
from flamingo_ft.data import Sample, open_data
from flamingo_ft.data.collate import pack
from flamingo_ft.data.encode import encode
from flamingo_ft.data.pairs import prompt_and_answers
from flamingo_ft.data.sample import Video, message_text
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor

LOOKED_AT = 50_000  # samples
CANDIDATES = 256  # of them that look longest, whose tokens are counted
PACKED_ROWS = 256  # laid out to see how many images a row gets
TURN = 24  # characters that a chat template writes around a message, about


@dataclass(frozen=True)
class Batch:
    """samples texts (packed: rows) of text_tokens tokens each, with images images of (3, height, width) to each; a
    video's frames count as so many images.

    where_from: how text_tokens was found. answers: texts of each sample: of a pair two, which show the same images.
    """

    samples: int
    text_tokens: int
    images: int
    image_size: tuple[int, int]
    where_from: str = "as given"
    answers: int = 1

    def tensors(self) -> dict[str, Tensor]:
        """A batch as the collator makes it: ids, mask and labels (B, T), pixels (B, M, 3, H, W)."""
        rows = self.samples * self.answers
        text = {name: torch.zeros(rows, self.text_tokens, dtype=torch.long) for name in TEXT}
        if not self.images:
            return text
        return text | {"pixel_values": torch.zeros(rows, self.images, 3, *self.image_size)}

    def media(self) -> Tensor:
        """The images of all samples, as they are before a batch is put together of them."""
        return torch.zeros(self.samples, self.images, 3, *self.image_size)


TEXT = ("input_ids", "attention_mask", "labels")


def longest(recipe: Recipe, processor: FlamingoProcessor, limit: int) -> tuple[int, int, str] | None:
    """Text tokens and images of the longest of the recipe's first samples, or of rows packed of them, and where they
    were found; None without its files, or where they are on the Hub: a plan downloads no data."""
    if not all(source.path is not None and path_exists(source.path) for source in recipe.data.train):
        return None
    data = open_data(recipe.data, recipe.train.seed)
    samples = itertools.islice(data.samples(data.train), LOOKED_AT)
    if recipe.data.packing and limit < NO_CONTEXT_LIMIT:
        return _fullest_row(itertools.islice(samples, CANDIDATES), recipe, processor, limit)
    count, images, likely = 0, 0, []
    for count, sample in enumerate(samples, start=1):
        images = max(images, _frames(sample, recipe))
        add = heapq.heappush if count <= CANDIDATES else heapq.heappushpop
        add(likely, (_length(sample), count, sample))
    tokens = max(_text_tokens(processor, sample) for *_, sample in likely)
    where_from = (
        "the longest of the data" if count < LOOKED_AT else f"the longest of the first {LOOKED_AT:,} samples"
    )
    return min(tokens, limit), images, where_from


def _fullest_row(
    samples: Iterable[Sample], recipe: Recipe, processor: FlamingoProcessor, limit: int
) -> tuple[int, int, str]:
    """The same of packed rows: as long as a row may be, with the most images of some rows of these samples."""
    sizes = [(len(encode(processor, one.messages).input_ids), _frames(one, recipe)) for one in samples]
    fitting = [size for size in sizes if size[0] <= limit]
    times = 1 + PACKED_ROWS * limit // max(1, sum(tokens for tokens, _ in fitting))
    rows = pack(fitting * times, lambda size: size[0], limit)
    images = max((sum(frames for _, frames in row) for row in rows), default=1)
    return limit, images, f"rows packed of the first {len(sizes)} samples"


def longest_batch(
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
        tokens, images = (
            own if own is not None else other for own, other in zip((tokens, images), found, strict=False)
        )
    if tokens >= NO_CONTEXT_LIMIT:
        raise UserError(
            "data.max_text_tokens: found neither data nor a limit to plan for; set it, or --text-tokens"
        )
    return Batch(
        recipe.train.batch_size, tokens, images, size, where_from, 2 if recipe.train.method == "dpo" else 1
    )


def _frames(sample: Sample, recipe: Recipe) -> int:
    """Images for the tower; a video file has as many frames as are taken of one."""
    most = recipe.data.video_frames
    videos = [min(len(m.frames) or most, most) for m in sample.images if isinstance(m, Video)]
    return len(sample.images) - len(videos) + sum(videos)


def _length(sample: Sample) -> int:
    """In characters, about."""
    return max(sum(len(message_text(message)) + TURN for message in text) for text in _texts(sample))


def _text_tokens(processor: FlamingoProcessor, sample: Sample) -> int:
    return max(len(encode(processor, text).input_ids) for text in _texts(sample))


def _texts(sample: Sample) -> list[list[dict[str, Any]]]:
    """The sample's text; of a pair both."""
    if not sample.rejected:
        return [sample.messages]
    prompt, *answers = prompt_and_answers(sample)
    return [[*prompt, *answer] for answer in answers]
