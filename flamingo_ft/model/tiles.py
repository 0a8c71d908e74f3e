"""Tiles of large images: which grid an image is divided into, and the views that the tower gets of it.

A tile is as large as the tower's input. The image is resized to the whole grid, so that nothing is cut off,
and one more view shows all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

Grid = tuple[int, int]  # rows, columns
UNTILED: Grid = (1, 1)


@dataclass(frozen=True)
class Tiling:
    """How images are divided into tiles.

    max_tiles: the most tiles of one image. tile_pixels: side in pixels of the part of an image that one tile
    shows, at the image's own resolution; None for the side of the tower's input. thumbnail: whether the whole
    image, scaled down, is one more view, before those of its tiles.
    """

    max_tiles: int
    tile_pixels: int | None = None
    thumbnail: bool = True

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All grids of at most ``max_tiles`` tiles."""
        return _grids(self.max_tiles)

    def grid(self, width: int, height: int, tower: tuple[int, int]) -> Grid:
        """Return the grid for an image of width x height pixels. tower: height and width of its input.

        Of the grids with at most ``max_tiles`` tiles, it preserves the most of the image's resolution when
        the image is fitted into it, its shape unchanged; of equal ones, the one with the fewest tiles. This
        is the choice of LLaVA-NeXT among its resolutions.
        """
        tile_height, tile_width = (self.tile_pixels,) * 2 if self.tile_pixels else tower

        def scale(grid: Grid) -> float:
            return min(1.0, grid[0] * tile_height / height, grid[1] * tile_width / width)

        # Rounded: quotients that are equal on paper may differ in their last bit.
        return min(self.grids, key=lambda grid: (-round(scale(grid), 9), grid[0] * grid[1], grid))

    def views(
        self, image: Image.Image, grid: Grid, tower: tuple[int, int], resampling: Image.Resampling
    ) -> list[Image.Image]:
        """Return the views of an image, each as large as the tower's input, in the order of `view_names`."""
        (rows, columns), (height, width) = grid, tower
        whole = [image.resize((width, height), resampling)] if self.has_whole_view(grid) else []
        if grid == UNTILED:
            return whole
        canvas = image.resize((columns * width, rows * height), resampling)
        corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
        return whole + [canvas.crop((x, y, x + width, y + height)) for x, y in corners]

    def view_names(self, grid: Grid) -> list[str]:
        """Return a name for each view, unique for one image: the whole first, then tiles row by row."""
        rows, columns = grid
        if grid == UNTILED:
            return ["untiled"]
        whole = ["whole"] if self.thumbnail else []
        return whole + [f"{rows}x{columns}-{index}" for index in range(rows * columns)]

    def has_whole_view(self, grid: Grid) -> bool:
        """Return whether the first view of an image with this grid shows all of it."""
        return self.thumbnail or grid == UNTILED

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as they are stored with a processor."""
        return dict(vars(self))


@lru_cache
def _grids(max_tiles: int) -> tuple[Grid, ...]:
    return tuple(
        (rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)
    )
