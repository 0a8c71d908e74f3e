"""The inputs on which the golden numbers were recorded."""

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

# No image token may come out: OpenFlamingo would look for its image. Random weights like to repeat
# themselves, which would hide a difference.
GENERATION = {
    "max_new_tokens": 8,
    "do_sample": False,
    "pad_token_id": PAD_TOKEN,
    "suppress_tokens": [MEDIA_TOKEN],
    "no_repeat_ngram_size": 2,
    "use_cache": True,  # MPT's configuration says False
}

# A gate's gradient is one number, a sum that may come near zero by chance, where float32 no longer resolves
# it to 1e-5. With these batches none does: float32 is within 4e-6 of float64 for every gradient of every
# family.
INTERLEAVED_SEEDS = {"opt": 3, "llama": 22, "gpt_neox": 10, "mpt": 19, "gptj": 25, "gpt_neo": 14}


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask, labels (B, T); vision_x (B, M, 1, 3, H, W), where slots without an image
    token hold images no text looks at (OpenFlamingo wants the same M for every sample)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    vision_x: Tensor


def make_batch(name: str, length: int, media: tuple[tuple[int, ...], ...], pads: tuple[int, ...]) -> Batch:
    """A batch with image tokens at the positions `media` of each row and `pads` padding tokens before it."""
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
    """Two, one and no images, behind 0, 3 and 5 padding tokens."""
    return make_batch("left_padded", 12, ((1, 6), (4,), ()), (0, 3, 5))


def prompts() -> Batch:
    """Prompts to continue: two, three and one images, the shorter ones padded on the left."""
    return make_batch("prompts", 9, ((1, 5), (2, 3, 7), (6,)), (0, 2, 4))


def continuation() -> Tensor:
    """Four tokens (B, 4) that follow `prompts`, none of them an image."""
    return integers("continuation", (3, 4), PAD_TOKEN + 2, EOC_TOKEN)


def images_first() -> Batch:
    """Every row begins with an image: what OpenFlamingo's all-images mode needs to be right."""
    return make_batch("images_first", 12, ((0, 4, 9), (0, 6), (0,)), (0, 0, 0))


def training_batches() -> list[Batch]:
    """A fixed sequence of batches to take turns."""
    media = (((2, 3, 8), (0, 6), (5,)), ((0, 5), (1,), (3, 4, 7)), ((4,), (2, 6, 9), ()), ((1,), (), (0, 8)))
    return [make_batch(f"training.{i}", 12, media[i], (0, 0, 0)) for i in range(TRAINING_BATCHES)]
