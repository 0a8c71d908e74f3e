"""What the tower gets of one medium, and a batch of it: views of an image, or frames of a video.

Shapes: B samples, M media, F views or frames, C channels, H height, W width, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .geometry import Size
from .tiles import UNTILED, Grid


@dataclass(frozen=True, eq=False)
class Views:
    """One medium: pixels (F, C, H, W), or the tower's tokens for them (F, V, D).

    grid: rows and columns of an image's tiles, the last views; `UNTILED` for other images and for videos.
    image_size: width and height in pixels of the image that the views were made from; None for a video.
    """

    values: Tensor
    grid: Grid = UNTILED
    image_size: Size | None = None

    def __len__(self) -> int:
        return len(self.values)


def stack_media(rows: Sequence[Sequence[Views]], name: str = "pixel_values") -> dict[str, Tensor]:
    """Stack the media of each sample to ``name``, (B, M, C, H, W) or, for tokens, (B, M, V, D).

    Padding is zero. If a medium has several views, there is an axis F after M; if their numbers differ,
    frame_counts (B, M) is returned too; and if images are tiled, tile_grids (B, M, 2). {} without media.
    """
    media = [medium for row in rows for medium in row]
    if not media:
        return {}
    max_media, max_views = max(map(len, rows)), max(map(len, media))
    shape = len(rows), max_media, max_views, *media[0].values.shape[1:]
    padded = sum(map(len, media)) < len(rows) * max_media * max_views
    values = media[0].values.new_zeros(shape) if padded else media[0].values.new_empty(shape)
    counts = torch.zeros(len(rows), max_media, dtype=torch.long)
    for b, row in enumerate(rows):
        for m, medium in enumerate(row):
            values[b, m, : len(medium)] = medium.values
            counts[b, m] = len(medium)
    if max_views == 1:
        return {name: values[:, :, 0]}
    batch = {name: values}
    if any(len(medium) != max_views for medium in media):
        batch["frame_counts"] = counts
    return batch | stack_grids(rows)


class HasGrid(Protocol):
    """A medium with the grid of its tiles."""

    @property
    def grid(self) -> Grid: ...


def stack_grids(rows: Sequence[Sequence[HasGrid]]) -> dict[str, Tensor]:
    """Return tile_grids (B, M, 2), padded with `UNTILED`; {} if no medium is tiled."""
    if all(medium.grid == UNTILED for row in rows for medium in row):
        return {}
    grids = torch.ones(len(rows), max(map(len, rows)), 2, dtype=torch.long)
    for b, row in enumerate(rows):
        for m, medium in enumerate(row):
            grids[b, m] = torch.tensor(medium.grid)
    return {"tile_grids": grids}
