"""Where points of an image are in what the model sees of it.

An image is cropped, flipped, resized and padded on its way to the tower. `ImageGeometry` follows with the
same steps, each of them along the axes:

    geometry = ImageGeometry.of(640, 480).flip().crop(80, 0, 480, 480).resize(224, 224)
    geometry.to_view((100, 50, 300, 250))  # pixels of the original -> fractions of what the model sees
    geometry.to_original((0.1, 0.2, 0.5, 0.6))  # and back
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Corners = tuple[float, float, float, float]  # left, top, right, bottom
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Axis:
    """One axis of a geometry: position -> scale * position + offset."""

    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, position: float) -> float:
        return self.scale * position + self.offset

    def then(self, scale: float, offset: float) -> Axis:
        """Return this axis followed by another scale and offset."""
        return Axis(self.scale * scale, self.offset * scale + offset)

    def inverse(self, position: float) -> float:
        """Return the position that is mapped to ``position``."""
        return (position - self.offset) / self.scale


@dataclass(frozen=True)
class ImageGeometry:
    """Maps pixels of an upright original image to pixels of a picture that was made from it.

    original_size, picture_size: width and height of both. visible: the part of the original that is in the
    picture. x, y: from the original to the picture.
    """

    original_size: Size
    picture_size: Size
    visible: Corners
    x: Axis = Axis()
    y: Axis = Axis()

    @classmethod
    def of(cls, width: int, height: int) -> ImageGeometry:
        """Return the geometry of an image as it is."""
        return cls((width, height), (width, height), (0, 0, width, height))

    def crop(self, left: int, top: int, width: int, height: int) -> ImageGeometry:
        """Return the geometry after a crop. Outside of the picture it is a padding."""
        x, y = self.x.then(1, -left), self.y.then(1, -top)
        cropped = replace(self, picture_size=(width, height), x=x, y=y)
        return replace(cropped, visible=cropped.to_original((0, 0, 1, 1)))

    def flip(self) -> ImageGeometry:
        """Return the geometry after a left-right flip."""
        return replace(self, x=self.x.then(-1, self.picture_size[0]))

    def resize(self, width: int, height: int) -> ImageGeometry:
        """Return the geometry after a resize that may change the picture's shape."""
        old_width, old_height = self.picture_size
        x, y = self.x.then(width / old_width, 0), self.y.then(height / old_height, 0)
        return replace(self, picture_size=(width, height), x=x, y=y)

    def to_view(self, box: Corners) -> Corners:
        """Map a box in pixels of the original to fractions of the picture: its visible part."""
        left, top, right, bottom = clip(box, self.visible)
        width, height = self.picture_size
        first, second = sorted((self.x(left) / width, self.x(right) / width))
        return first, self.y(top) / height, second, self.y(bottom) / height

    def to_original(self, box: Corners) -> Corners:
        """Map a box in fractions of the picture to pixels of the original: its visible part."""
        left, top, right, bottom = box
        width, height = self.picture_size
        first, second = sorted((self.x.inverse(left * width), self.x.inverse(right * width)))
        pixels = first, self.y.inverse(top * height), second, self.y.inverse(bottom * height)
        return clip(pixels, self.visible)

    def visible_area(self, box: Corners) -> float:
        """Return the area of the visible part of a box, in pixels of the original."""
        return area(clip(box, self.visible))


def clip(box: Corners, part: Corners) -> Corners:
    """Return the part of a box inside of another; one that is outside becomes empty, at the border."""
    left, top, right, bottom = part
    x1, y1, x2, y2 = box
    return (
        min(max(x1, left), right),
        min(max(y1, top), bottom),
        min(max(x2, left), right),
        min(max(y2, top), bottom),
    )


def area(box: Corners) -> float:
    """Return the area of a box; 0 for one whose sides are in the wrong order."""
    left, top, right, bottom = box
    return max(0.0, right - left) * max(0.0, bottom - top)


def tower_geometry(geometry: ImageGeometry, preprocess: Mapping[str, Any], input_size: Size) -> ImageGeometry:
    """Return the geometry after OpenCLIP's inference transform.

    preprocess: fields of its PreprocessCfg. input_size: height and width of the tower's input.
    """
    height, width = input_size
    resize_mode = preprocess.get("resize_mode") or "shortest"
    if resize_mode == "squash":
        return geometry.resize(width, height)
    resized = geometry.resize(*_kept_ratio(geometry.picture_size, (width, height), resize_mode))
    left, top = map(_centred, resized.picture_size, (width, height))
    return resized.crop(left, top, width, height)


def _kept_ratio(size: Size, target: Size, resize_mode: str) -> Size:
    """Return the size after the resize that keeps the picture's shape, rounded as the transform rounds it."""
    width, height = size
    if resize_mode == "shortest" and target[0] == target[1]:  # torchvision's Resize rounds down
        longer = int(target[0] * max(size) / min(size))
        return (target[0], longer) if width <= height else (longer, target[0])
    ratios = width / target[0], height / target[1]
    ratio = max(ratios) if resize_mode == "longest" else min(ratios)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _centred(side: int, target: int) -> int:
    """Return where a crop of ``target`` pixels begins; of a padding, minus its smaller half."""
    return -((target - side) // 2) if side < target else round((side - target) / 2)
