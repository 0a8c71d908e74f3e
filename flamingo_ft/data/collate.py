"""Samples to a batch of tensors.

Shapes: B samples, T text tokens, M images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor

from .encode import IGNORED, Encoded, encode
from .media import open_image


class Collator:
    """Rows of a dataset (the fields of `Sample`) to input_ids, attention_mask, labels (B, T) and pixel_values.

    Raises UserError for a sample longer than ``max_text_tokens`` or without a word to learn, a dialogue that the
    chat template refuses, and an image that cannot be read.
    """

    def __init__(self, processor: FlamingoProcessor, max_text_tokens: int):
        self.processor = processor
        self.max_text_tokens = max_text_tokens

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        encoded = [self._encode(row) for row in rows]
        pad_token_id = self.processor.tokenizer.pad_token_id
        batch = pad_ids([sample.input_ids for sample in encoded], pad_token_id, "right")
        batch["labels"] = pad([sample.labels for sample in encoded], IGNORED, "right")
        return batch | load_pixels(self.processor, rows)

    def _encode(self, row: Mapping[str, Any]) -> Encoded:
        try:
            sample = encode(self.processor, row["messages"])
        except UserError as error:
            raise UserError(f"{row['where']}: {error}") from None
        found = len(sample.input_ids)
        if found > self.max_text_tokens:
            raise UserError(
                f"{row['where']}: found {found} text tokens, the limit is {self.max_text_tokens}; "
                "shorten the sample or raise data.max_text_tokens (up to the language model's context)"
            )
        if all(label == IGNORED for label in sample.labels):
            raise UserError(f"{row['where']}: found no word of the assistant's to learn; remove the sample")
        return sample


def load_pixels(processor: FlamingoProcessor, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """pixel_values (B, M, C, H, W) of the rows' image files; nothing where no row has any."""
    images = [[open_image(path, row["where"]) for path in row["images"]] for row in rows]
    return {"pixel_values": processor.pixel_values(images)} if any(images) else {}


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
