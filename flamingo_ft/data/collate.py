"""From encoded samples to a batch of tensors, padded or packed.

Packing puts several samples into one row, each blind to the others: less padding if samples differ in length.

Shapes: B samples or packed rows, T text tokens, M media, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from flamingo_ft.model.processor import FlamingoProcessor
from flamingo_ft.model.views import stack_media

from .encode import IGNORED, Encoded
from .media import load_pixels

OPEN_ROWS = 16  # packed rows that a sample may still be added to
PADDING = -1  # document id of padding

Item = TypeVar("Item")


def collate_text(samples: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels (B, T), padded on the right."""
    batch = pad_ids([sample.input_ids for sample in samples], pad_token_id, "right")
    return batch | {"labels": pad([sample.labels for sample in samples], IGNORED, "right")}


def pad_ids(
    sequences: Sequence[Sequence[int]], pad_token_id: int, side: Literal["left", "right"]
) -> dict[str, Tensor]:
    """Return input_ids and attention_mask (B, T), padded on one side."""
    ones = [[1] * len(sequence) for sequence in sequences]
    return {"input_ids": pad(sequences, pad_token_id, side), "attention_mask": pad(ones, 0, side)}


def pad(sequences: Sequence[Sequence[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    """Pad sequences of different lengths to one tensor (B, T)."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def load_media(processor: FlamingoProcessor, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return `stack_media` of the rows' ``images``. Raises UserError, beginning with the row's ``where``."""
    return stack_media(
        [[load_pixels(processor, medium, row["where"]) for medium in row["images"]] for row in rows]
    )


def pack(
    items: Iterable[Item], length: Callable[[Item], int], row_length: int, open_rows: int = OPEN_ROWS
) -> Iterator[list[Item]]:
    """Yield rows of items with a total length of at most ``row_length``, always the same for the same items.

    An item goes into the oldest row with room for it. When there are more than ``open_rows`` rows, the
    fullest is yielded. Raises ValueError for an item longer than a row.
    """
    rows: list[tuple[int, list[Item]]] = []  # length so far, items
    for item in items:
        size = length(item)
        if size > row_length:
            raise ValueError(f"item of length {size} does not fit into a row of {row_length}")
        index = next((i for i, (filled, _) in enumerate(rows) if filled + size <= row_length), None)
        if index is None:
            rows.append((size, [item]))
        else:
            filled, row = rows[index]
            row.append(item)
            rows[index] = (filled + size, row)
        if len(rows) > open_rows:
            fullest = max(range(len(rows)), key=lambda i: rows[i][0])
            yield rows.pop(fullest)[1]
    yield from (row for _, row in rows)


def collate_packed(rows: Sequence[Sequence[Encoded]], pad_token_id: int) -> dict[str, Tensor]:
    """Return input_ids, labels, document_ids and position_ids (B, T) of packed rows.

    Positions restart with each sample, and its first token has no label: nothing before it may predict it.
    There is no attention mask: language models separate samples by their positions, and only if no mask is
    given.
    """
    length = max(sum(sample.text_tokens for sample in row) for row in rows)
    packed = [_packed_row(row, length, pad_token_id) for row in rows]
    return {name: torch.tensor([row[name] for row in packed]) for name in packed[0]}


def _packed_row(row: Sequence[Encoded], length: int, pad_token_id: int) -> dict[str, list[int]]:
    """Concatenate the samples of one row; its padding is a document of its own."""
    padding = length - sum(sample.text_tokens for sample in row)
    documents = [*enumerate(row), (PADDING, Encoded([pad_token_id] * padding, [IGNORED] * padding))]
    packed: dict[str, list[int]] = {"input_ids": [], "labels": [], "document_ids": [], "position_ids": []}
    for document_id, sample in documents:
        packed["input_ids"] += sample.input_ids
        packed["labels"] += [IGNORED, *sample.labels[1:]][: len(sample.labels)]
        packed["document_ids"] += [document_id] * sample.text_tokens
        packed["position_ids"] += range(sample.text_tokens)
    return packed
