"""Encoded samples to a batch of tensors.

Shapes: B samples, T text tokens, M media, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flamingo_ft.model.processor import FlamingoProcessor

from .encode import IGNORED, Encoded
from .media_reader import read_pixels
from .stack import stack_media


def collate_text(samples: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, T) of encoded samples, padded at the end."""
    batch = pad_ids([sample.input_ids for sample in samples], pad_token_id, "right")
    return batch | {"labels": pad([sample.labels for sample in samples], IGNORED, "right")}


def load_media(processor: FlamingoProcessor, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What `stack_media` makes of the rows' ``images``; ``where`` is the row in errors. UserError for an unreadable one."""
    return stack_media(
        [[read_pixels(processor, medium, row["where"]) for medium in row["images"]] for row in rows]
    )


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
