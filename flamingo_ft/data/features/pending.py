"""A batch whose images are partly cached: what workers send to the training process.

Shapes: B samples, M media, F frames, S frames found, P frames to encode, C channels, H height, W width, V
visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .store import FeatureStore

FRAME_INDEX, FOUND, FRESH, FRESH_KEYS = "frame_index", "found_tokens", "fresh_pixels", "fresh_keys"


@dataclass(frozen=True, eq=False)
class Frame:
    """An image or a frame of a video: its tokens (V, D) if they are cached, else its pixels (C, H, W).
    key: in the cache."""

    key: str
    tokens: Tensor | None = None
    pixels: Tensor | None = None


def lookup_frame(
    store: FeatureStore, content: bytes, pixels: Callable[[], Tensor], number: int | None = None
) -> Frame:
    """Look up an image file by its content; of a video its frame ``number``, counted in the whole video.

    Args:
        pixels: decodes and transforms the image to (C, H, W); called only if its tokens are not cached.
    """
    key = store.key_of(content, number)
    tokens = store.get(key)
    return Frame(key, pixels=pixels()) if tokens is None else Frame(key, tokens)


def collate_frames(rows: Sequence[Sequence[Sequence[Frame]]]) -> dict[str, Any]:
    """Collate the frames of each medium of each sample for `FeatureCache.complete`; {} without media.

    Returns found_tokens (S, V, D), fresh_pixels (P, C, H, W) and their fresh_keys, each image once;
    frame_index (B, M, F) into found and fresh frames together, -1 for padding; frame_counts (B, M).
    """
    frames = [frame for row in rows for medium in row for frame in medium]
    if not frames:
        return {}
    found = {frame.key: frame.tokens for frame in frames if frame.tokens is not None}
    fresh = {
        frame.key: frame.pixels for frame in frames if frame.key not in found and frame.pixels is not None
    }
    numbers = {key: number for number, key in enumerate([*found, *fresh])}
    index, counts = _padded([[[numbers[frame.key] for frame in medium] for medium in row] for row in rows])
    batch: dict[str, Any] = {FRAME_INDEX: index, "frame_counts": counts}
    if found:
        batch[FOUND] = torch.stack(list(found.values()))
    if fresh:
        batch[FRESH], batch[FRESH_KEYS] = torch.stack(list(fresh.values())), list(fresh)
    return batch


def _padded(rows: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Return the frame numbers as (B, M, F), padded with -1, and how many each medium has (B, M)."""
    media = max(len(row) for row in rows)
    frames = max(len(medium) for row in rows for medium in row)
    index = torch.full((len(rows), media, frames), -1)
    counts = torch.zeros(len(rows), media, dtype=torch.long)
    for b, row in enumerate(rows):
        for m, medium in enumerate(row):
            index[b, m, : len(medium)] = torch.tensor(medium)
            counts[b, m] = len(medium)
    return index, counts
