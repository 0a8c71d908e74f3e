"""Encoded samples to a batch of tensors.

Shapes: B samples, T text tokens, M media, F frames, C channels, H height, W width.


Media of different numbers and lengths to one tensor.

Shapes: B samples, M media, F frames, C channels, H height, W width.


Several samples in one row, each blind to the others: less padding where samples are of different lengths.

Shapes: B rows, T text tokens.

"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from flamingo_ft.model.processor import FlamingoProcessor

from .encode import IGNORED, Encoded
from .media import load_pixels


def collate_text(samples: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, T) of encoded samples, padded at the end."""
    batch = pad_ids([sample.input_ids for sample in samples], pad_token_id, "right")
    return batch | {"labels": pad([sample.labels for sample in samples], IGNORED, "right")}


def load_media(processor: FlamingoProcessor, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What `stack_media` makes of the rows' ``images``; ``where`` is the row in errors. UserError for an unreadable one."""
    return stack_media(
        [[load_pixels(processor, medium, row["where"]) for medium in row["images"]] for row in rows]
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


def stack_media(rows: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """The media (F, C, H, W) of each sample to pixel_values (B, M, C, H, W), padded with zeros; {} without any.

    Where a medium has several frames: (B, M, F, C, H, W), and where not all have as many, frame_counts (B, M).
    """
    media = [medium for row in rows for medium in row]
    if not media:
        return {}
    most, frames = max(map(len, rows)), max(map(len, media))
    pixels = media[0].new_zeros(len(rows), most, frames, *media[0].shape[1:])
    counts = torch.zeros(len(rows), most, dtype=torch.long)
    for b, row in enumerate(rows):
        for m, medium in enumerate(row):
            pixels[b, m, : len(medium)] = medium
            counts[b, m] = len(medium)
    if frames == 1:
        return {"pixel_values": pixels[:, :, 0]}
    uneven = any(len(medium) != frames for medium in media)
    return {"pixel_values": pixels} | ({"frame_counts": counts} if uneven else {})


OPEN_ROWS = 16  # rows that a sample may still go to
PADDING = -1  # the document of padding

Item = TypeVar("Item")


def pack(
    items: Iterable[Item], length: Callable[[Item], int], row_length: int, open_rows: int = OPEN_ROWS
) -> Iterator[list[Item]]:
    """Rows of items that together are at most ``row_length`` long, the same ones for the same order of arrival.

    An item goes into the oldest row that has room for it. Rows beyond ``open_rows`` are given out, fullest first. Raises
    ValueError for an item that no row has room for.
    """
    rows: list[tuple[int, list[Item]]] = []
    for item in items:
        size = length(item)
        if size > row_length:
            raise ValueError(f"got an item of length {size}, a row holds {row_length}")
        place = next(
            (index for index, (filled, _) in enumerate(rows) if filled + size <= row_length), len(rows)
        )
        filled, held = rows[place] if place < len(rows) else (0, [])
        rows[place : place + 1] = [(filled + size, [*held, item])]
        if len(rows) > open_rows:
            yield rows.pop(max(range(len(rows)), key=lambda index: rows[index][0]))[1]
    yield from (held for _, held in rows)


def collate_packed(rows: Sequence[Sequence[Encoded]], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, labels, document_ids and position_ids (B, T) of rows of encoded samples.

    Positions begin anew with each sample, and its first token has no label: nothing before it may predict it. There is
    no attention mask: language models tell samples apart by their positions, and only where no mask is given.
    """
    length = max(sum(len(sample.input_ids) for sample in row) for row in rows)
    laid = [_lay(row, length, pad_token_id) for row in rows]
    return {name: torch.tensor([row[name] for row in laid]) for name in laid[0]}


def _lay(row: Sequence[Encoded], length: int, pad_token_id: int) -> dict[str, list[int]]:
    """One row; its padding is a document of its own."""
    rest = length - sum(len(sample.input_ids) for sample in row)
    parts = [*row, Encoded([pad_token_id] * rest, [IGNORED] * rest)]
    numbers = [*range(len(row)), PADDING]
    return {
        "input_ids": [token for part in parts for token in part.input_ids],
        "labels": [label for part in parts for label in [IGNORED, *part.labels[1:]][: len(part.labels)]],
        "document_ids": [number for number, part in zip(numbers, parts, strict=True) for _ in part.input_ids],
        "position_ids": [position for part in parts for position in range(len(part.input_ids))],
    }
