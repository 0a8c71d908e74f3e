"""Inputs of the golden numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.golden.deterministic_weights import integers, uniform
from tests.golden.tiny_models import EOC_TOKEN, IMAGE_SIZE, MEDIA_TOKEN, PAD_TOKEN

MAX_IMAGES = 3
TRAINING_STEPS = 20
TRAINING_BATCHES = 4
LEARNING_RATE = 1e-3

# Image tokens are suppressed: OpenFlamingo would expect an image for each. So are repetitions, to which
# random weights tend and which would hide differences.
GENERATION = {
    "max_new_tokens": 8,
    "do_sample": False,
    "pad_token_id": PAD_TOKEN,
    "suppress_tokens": [MEDIA_TOKEN],
    "no_repeat_ngram_size": 2,
    "use_cache": True,  # False in MPT's configuration
}

# The gradient of a gate is a sum that may be near zero by chance; float32 then does not resolve it to 1e-5.
# With these seeds, float32 is within 4e-6 of float64 for every gradient of every family.
INTERLEAVED_SEEDS = {"opt": 3, "llama": 22, "gpt_neox": 10, "mpt": 19, "gptj": 25, "gpt_neo": 14}


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask and labels (B, T); vision_x (B, M, 1, 3, H, W).

    OpenFlamingo needs the same M for every sample. No token attends to images beyond a row's media tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    vision_x: Tensor


def make_batch(name: str, length: int, media: tuple[tuple[int, ...], ...], pads: tuple[int, ...]) -> Batch:
    """Return a batch with image tokens at the positions `media` of each row, after `pads` padding tokens."""
    rows = len(media)
    ids = integers(f"{name}.ids", (rows, length), PAD_TOKEN + 2, EOC_TOKEN)
    mask = torch.ones_like(ids)
    for row, (positions, pad) in enumerate(zip(media, pads, strict=True)):
        ids[row, list(positions)] = MEDIA_TOKEN
        ids[row, :pad] = PAD_TOKEN
        mask[row, :pad] = 0
    ids[0, -1] = EOC_TOKEN
    labels = ids.masked_fill((ids == MEDIA_TOKEN) | (mask == 0), -100)
    pixels = uniform(f"{name}.pixels", (rows, MAX_IMAGES, 1, 3, IMAGE_SIZE, IMAGE_SIZE), -2.0, 2.0)
    return Batch(ids, mask, labels, pixels)


def interleaved(family: str) -> Batch:
    """Three, two and one images; text before the first; two images side by side; no padding."""
    return make_batch(f"interleaved.{INTERLEAVED_SEEDS[family]}", 12, ((2, 3, 8), (0, 6), (5,)), (0, 0, 0))


def left_padded() -> Batch:
    """Two, one and no images, after 0, 3 and 5 padding tokens."""
    return make_batch("left_padded", 12, ((1, 6), (4,), ()), (0, 3, 5))


def prompts() -> Batch:
    """Prompts to continue: two, three and one images, the shorter ones padded on the left."""
    return make_batch("prompts", 9, ((1, 5), (2, 3, 7), (6,)), (0, 2, 4))


def continuation() -> Tensor:
    """Return four tokens (B, 4) that follow `prompts`, none of them an image token."""
    return integers("continuation", (3, 4), PAD_TOKEN + 2, EOC_TOKEN)


def images_first() -> Batch:
    """Every row begins with an image, without which OpenFlamingo's all-images mode is wrong."""
    return make_batch("images_first", 12, ((0, 4, 9), (0, 6), (0,)), (0, 0, 0))


def training_batches() -> list[Batch]:
    """Return the batches that training cycles through."""
    media = (((2, 3, 8), (0, 6), (5,)), ((0, 5), (1,), (3, 4, 7)), ((4,), (2, 6, 9), ()), ((1,), (), (0, 8)))
    return [make_batch(f"training.{i}", 12, media[i], (0, 0, 0)) for i in range(TRAINING_BATCHES)]
