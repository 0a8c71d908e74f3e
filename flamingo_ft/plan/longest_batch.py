"""The batch that a run must have room for: the recipe's longest samples, all in one batch."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.backbones.decoder_layers import NO_CONTEXT_LIMIT
from flamingo_ft.config import Recipe, TrainSection
from flamingo_ft.config.paths import path_exists
from flamingo_ft.data import Sample, open_data
from flamingo_ft.data.collate import pack
from flamingo_ft.data.encode import encode, encode_prompt
from flamingo_ft.data.pairs import answer_start, prompt_and_answers
from flamingo_ft.data.sample import Video, message_text, with_widest_boxes
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.tiles import Tiling

MAX_SAMPLES_READ = 50_000
TOKENIZED_SAMPLES = 256  # of those, the longest by `_length`
PACKED_ROWS = 256  # packed to see how many images a row gets
TEMPLATE_CHARACTERS = 24  # that a chat template writes around a message, roughly
DIGIT = 4  # characters: many tokenizers write each digit as a token of its own
DIGITS = re.compile(r"[0-9]")


@dataclass(frozen=True)
class Batch:
    """Sizes of a batch.

    Attributes:
        samples: samples, or packed rows.
        text_tokens: of each text.
        images: of each sample; every frame of a video counts.
        views: of each image: tiles and the whole image.
        image_size: height and width in pixels.
        where_from: where ``text_tokens`` comes from, for the user.
        answers: texts per sample, which show the same images: 2 for preference pairs, with grpo as many as
            are sampled.
    """

    samples: int
    text_tokens: int
    images: int
    image_size: tuple[int, int]
    where_from: str = "as given"
    answers: int = 1
    views: int = 1

    def tensors(self) -> dict[str, Tensor]:
        """Allocate a batch as the collator does: ids, mask and labels (B, T), pixels (B, M, F, 3, H, W)."""
        rows = self.samples * self.answers
        batch = {
            name: torch.zeros(rows, self.text_tokens, dtype=torch.long)
            for name in ("input_ids", "attention_mask", "labels")
        }
        if self.images:
            batch["pixel_values"] = torch.zeros(rows, self.images, self.views, 3, *self.image_size)
        return batch

    def media(self) -> Tensor:
        """Allocate the images of all samples, before they are collated."""
        return torch.zeros(self.samples, self.images, self.views, 3, *self.image_size)


def longest_batch(
    recipe: Recipe,
    processor: FlamingoProcessor,
    image_size: tuple[int, int],
    limit: int,
    sizes: Mapping[str, int | None],
) -> Batch:
    """Return the recipe's batch with every sample as long as the longest one.

    Args:
        limit: most text tokens that the recipe and the language model allow.
        sizes: "text_tokens" and "images" per sample. Those that are missing or None are read from the data;
            without data they are the limit and one image.

    Raises UserError if there is neither data nor a limit.
    """
    tokens, images, where_from = sizes.get("text_tokens"), sizes.get("images"), "as given"
    if tokens is None or images is None:
        longest = longest_sample(recipe, processor, limit) or (limit, 1, "the limit")
        data_tokens, data_images, data_where = longest
        if tokens is None:
            tokens, where_from = data_tokens, data_where
        images = data_images if images is None else images
    if tokens >= NO_CONTEXT_LIMIT:
        raise UserError(
            "data.max_text_tokens: got neither data nor a limit to plan for; set it, or --text-tokens"
        )
    train = recipe.train
    answers = {"dpo": 2, "grpo": train.grpo.num_generations}.get(train.method, 1)
    views = most_views(processor.image_processor.tiling)
    return Batch(train.samples_per_batch, tokens, images, image_size, where_from, answers, views)


def most_views(tiling: Tiling | None) -> int:
    """Return how many views an image has at most."""
    return 1 if tiling is None else max(len(tiling.view_names(grid)) for grid in tiling.grids)


def longest_sample(recipe: Recipe, processor: FlamingoProcessor, limit: int) -> tuple[int, int, str] | None:
    """Return the most text tokens and images of the first samples or packed rows, and where they come from.

    Returns None if the recipe's files are not on this machine: a plan downloads no data.
    """
    if not all(source.path is not None and path_exists(source.path) for source in recipe.data.train):
        return None
    data = open_data(recipe.data, recipe.train.seed)
    samples = map(with_widest_boxes, itertools.islice(data.samples(data.train), MAX_SAMPLES_READ))
    if recipe.data.packing and limit < NO_CONTEXT_LIMIT:
        return _fullest_row(itertools.islice(samples, TOKENIZED_SAMPLES), recipe, processor, limit)
    count, images, longest = 0, 0, []
    for count, sample in enumerate(samples, start=1):
        images = max(images, _images(sample, recipe))
        push = heapq.heappush if count <= TOKENIZED_SAMPLES else heapq.heappushpop
        push(longest, (_length(sample), count, sample))
    tokens = max(_text_tokens(processor, sample, recipe.train) for *_, sample in longest)
    description = "the longest of the data"
    if count == MAX_SAMPLES_READ:
        description = f"the longest of the first {MAX_SAMPLES_READ:,} samples"
    return min(tokens, limit), images, description


def _fullest_row(
    samples: Iterable[Sample], recipe: Recipe, processor: FlamingoProcessor, limit: int
) -> tuple[int, int, str]:
    """Return `longest_sample` of packed rows: the limit, and the most images of rows of ``samples``."""
    sizes = [
        (len(encode(processor, sample.messages).input_ids), _images(sample, recipe)) for sample in samples
    ]
    fitting = [size for size in sizes if size[0] <= limit]
    repeats = 1 + PACKED_ROWS * limit // max(1, sum(tokens for tokens, _ in fitting))
    rows = pack(fitting * repeats, lambda size: size[0], limit)
    images = max((sum(images for _, images in row) for row in rows), default=1)
    return limit, images, f"rows packed of the first {len(sizes)} samples"


def _images(sample: Sample, recipe: Recipe) -> int:
    """Count the images that the tower encodes; a video counts as the frames that are sampled from it."""
    limit = recipe.data.video_frames
    return sum(
        min(len(medium.frames) or limit, limit) if isinstance(medium, Video) else 1
        for medium in sample.images
    )


def _length(sample: Sample) -> int:
    """Estimate the length of the sample's longest text, in characters of words."""
    return max(sum(map(_message_length, text)) for text in _texts(sample))


def _message_length(message: Mapping[str, Any]) -> int:
    text = message_text(message)
    return len(text) + (DIGIT - 1) * len(DIGITS.findall(text)) + TEMPLATE_CHARACTERS


def _text_tokens(processor: FlamingoProcessor, sample: Sample, train: TrainSection) -> int:
    """Return the tokens of a sample's longest text; with grpo, of its question and a whole sampled answer."""
    if train.method == "grpo":
        question = sample.messages[: answer_start(sample.messages)]
        return len(encode_prompt(processor, question)) + train.grpo.max_completion_tokens
    return max(len(encode(processor, text).input_ids) for text in _texts(sample))


def _texts(sample: Sample) -> list[list[Mapping[str, Any]]]:
    """Return the sample's messages; for a preference pair those of both texts."""
    if not sample.rejected:
        return [list(sample.messages)]
    prompt, *answers = prompt_and_answers(sample)
    return [[*prompt, *answer] for answer in answers]
