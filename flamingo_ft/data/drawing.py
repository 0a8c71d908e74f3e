"""Boxes drawn on pictures, in one set of colours for all pages."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageColor, ImageDraw
from PIL.Image import Image as Picture
from PIL.Image import Resampling

from flamingo_ft.model.geometry import Corners, Size

ASKED, REFERENCE, PREDICTED = "asked about", "reference", "predicted"
COLOURS = {ASKED: "#57606a", REFERENCE: "#1f5fa8", PREDICTED: "#e36209"}  # also distinct to the colour-blind
HALO = "#ffffff"  # around each line, so that it is seen on any picture
SMALLEST_SIDE = 160  # smaller pictures are enlarged, pixel by pixel: lines need room
LINE_SHARE = 1 / 64  # line width relative to the picture's longer side

DrawnBox = tuple[Corners, str]  # corners in pixels of the original, and its kind, a key of COLOURS


def draw_boxes(picture: Picture, boxes: Sequence[DrawnBox], size: Size) -> Picture:
    """Return a copy of a picture with boxes on it.

    size: width and height of the original, of which the picture may be a smaller copy.
    """
    factor = -(-SMALLEST_SIDE // max(picture.size))  # rounded up
    drawn = picture.convert("RGB").resize(
        (picture.width * factor, picture.height * factor), Resampling.NEAREST
    )
    draw = ImageDraw.Draw(drawn)
    width = max(2, round(max(drawn.size) * LINE_SHARE))
    for corners, kind in boxes:
        left, top, right, bottom = scaled(corners, size, drawn.size)
        inner = [left, top, max(right - 1, left), max(bottom - 1, top)]
        outer = [inner[0] - width, inner[1] - width, inner[2] + width, inner[3] + width]
        draw.rectangle(outer, outline=ImageColor.getrgb(HALO), width=width)
        draw.rectangle(inner, outline=ImageColor.getrgb(COLOURS[kind]), width=width)
    return drawn


def scaled(corners: Corners, size: Size, new_size: Size) -> Corners:
    """Return a box on a picture of ``size`` as it lies on a copy of ``new_size``."""
    across, down = new_size[0] / size[0], new_size[1] / size[1]
    left, top, right, bottom = corners
    return left * across, top * down, right * across, bottom * down
