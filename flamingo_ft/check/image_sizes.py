"""How much larger the images of a recipe are than what the tower takes."""

from __future__ import annotations

from dataclasses import dataclass

MUCH_LARGER = 4  # times the side of the tower's input: 1 in 16 pixels is left


@dataclass(frozen=True)
class ImageSizes:
    """Median size of the training images and videos, and the size of the tower's input, in pixels.

    tiled: images are divided into tiles.
    """

    width: int
    height: int
    input_width: int
    input_height: int
    tiled: bool

    @property
    def note(self) -> str | None:
        """A line if the images are much larger than the input and are not divided into tiles."""
        shrunk = max(self.width / self.input_width, self.height / self.input_height)
        if self.tiled or shrunk < MUCH_LARGER:
            return None
        return (
            f"images have {self.width:,} x {self.height:,} pixels (medians), and the tower sees each in "
            f"{self.input_width} x {self.input_height}; if answers depend on detail such as text, "
            "set data.tiles"
        )
