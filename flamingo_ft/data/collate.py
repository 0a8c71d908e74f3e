"""Samples to a batch of tensors.

Shapes: B samples, T text tokens, M images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor

from .encode import IGNORED, Encoded
from .sample import Sample
from .too_long import encode_within

# What Pillow's decoders were seen to raise for files that are damaged or no images at all.
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, Image.DecompressionBombError)


class Collator:
    """Rows of a dataset (the fields of `Sample`) to input_ids, attention_mask, labels (B, T) and pixel_values.

    Raises UserError for a sample longer than ``max_text_tokens`` or without a word to learn, a dialogue that the
    chat template refuses, and an image that cannot be read.
    """

    def __init__(self, processor: FlamingoProcessor, max_text_tokens: int):
        self.processor = processor
        self.max_text_tokens = max_text_tokens

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        samples = [Sample(row["messages"], row["images"], row.get("task", ""), row["where"]) for row in rows]
        encoded = [encode_within(self.processor, sample, self.max_text_tokens) for sample in samples]
        return collate_text(encoded, self.processor.tokenizer.pad_token_id) | load_pixels(self.processor, rows)


def collate_text(samples: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, T) of encoded samples, padded at the end."""
    batch = pad_ids([sample.input_ids for sample in samples], pad_token_id, "right")
    return batch | {"labels": pad([sample.labels for sample in samples], IGNORED, "right")}


def load_pixels(processor: FlamingoProcessor, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """pixel_values (B, M, C, H, W) of the rows' image files; nothing where no row has any."""
    images = [[open_image(path, row["where"]) for path in row["images"]] for row in rows]
    return {"pixel_values": processor.pixel_values(images)} if any(images) else {}


def open_image(path: str | Path, where: str | None = None) -> Image.Image:
    """An image file as RGB, upright. UserError naming the file when it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UNREADABLE as error:
        prefix = f"{where}: " if where else ""
        reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise UserError(f"{prefix}{path}: not a readable image ({reason}); replace it") from None


def pad_ids(
    sequences: Sequence[Sequence[int]], pad_token_id: int, side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T), padded on one side."""
    ones = [[1] * len(sequence) for sequence in sequences]
    return {"input_ids": pad(sequences, pad_token_id, side), "attention_mask": pad(ones, 0, side)}


def pad(sequences: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    """Sequences of different lengths to one tensor (B, T)."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
