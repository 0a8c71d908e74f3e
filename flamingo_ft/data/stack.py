"""Media of different numbers and lengths to one tensor.

Shapes: B samples, M media, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
