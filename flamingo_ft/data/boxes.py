"""Boxes of a sample against what the model sees of its images: which are seen, and what answers point at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flamingo_ft.errors import UserError
from flamingo_ft.model.boxes import box_text, parse_boxes
from flamingo_ft.model.geometry import Corners, ImageGeometry, Size, area
from flamingo_ft.model.processor import FlamingoImageProcessor

from .augment import Augmentation
from .sample import Box, Sample

MIN_SEEN = 0.5  # of a box's area, that a random crop must leave
MIN_WHOLE = 0.95  # of a box's area, from which on it counts as seen whole: crops are in whole pixels
MAX_CUT = 0.01  # of all boxes, that may be cut off without a warning
SEE_WHOLE_IMAGES = "set model.vision.resize_mode to squash or longest, or data.tiles"


class PlacedBox(NamedTuple):
    """A box of an answer. image: index of its image; box: corners in pixels of the upright original."""

    image: int
    box: Corners


def boxes_on(sample: Sample, image: int) -> list[Box]:
    """Return the boxes on one of a sample's images."""
    return [box for box in sample.boxes if box.image == image]


def kept_in_view(
    augmentation: Augmentation, boxes: Sequence[Box], size: Size, images: FlamingoImageProcessor
) -> Augmentation:
    """Return the augmentation, without its crop if that would cut off most of a box.

    size: width and height of the image. What the tower's transform cuts off anyway does not count.
    """
    if not boxes:
        return augmentation
    whole = ImageGeometry.of(*size)
    seen, cropped = images.geometry(whole), images.geometry(augmentation.geometry(whole))
    corners = [box.pixels(*size) for box in boxes]
    if all(cropped.visible_area(box) >= MIN_SEEN * seen.visible_area(box) for box in corners):
        return augmentation
    return augmentation.without_crop()


def view_text(box: Box, geometry: ImageGeometry) -> str:
    """Return a box as text for the model.

    Raises UserError if it is not on its image, or if nothing of it is seen.
    """
    corners = box.pixels(*geometry.original_size)
    if not geometry.visible_area(corners):
        width, height = geometry.original_size
        raise UserError(
            f"{box.where}: outside of what the model sees of an image of {width} x {height} pixels, got "
            f"{list(box.corners)}; {SEE_WHOLE_IMAGES}"
        )
    return box_text(geometry.to_view(corners))


def cut_boxes(sample: Sample) -> int:
    """Return how many boxes the model sees only in part, of a sample whose boxes are text."""
    return sum(_is_cut(box, sample.geometries[box.image]) for box in sample.boxes)


def cut_boxes_warning(cut: int, boxes: int, kind: str = "boxes") -> str | None:
    """Return a line if more than `MAX_CUT` of ``boxes`` are cut off, else None."""
    if cut <= MAX_CUT * boxes:
        return None
    return (
        f"the tower's crop to the middle of the image cuts off {cut:,} of {boxes:,} {kind}; "
        f"{SEE_WHOLE_IMAGES}"
    )


def _is_cut(box: Box, geometry: ImageGeometry | None) -> bool:
    """Whether more of a box than its border is outside of what the model sees."""
    assert geometry is not None  # its image has a box
    corners = box.pixels(*geometry.original_size)
    return geometry.visible_area(corners) < MIN_WHOLE * area(corners)


def placed_boxes(
    text: str, geometries: Sequence[ImageGeometry | None], references: Sequence[Box] = ()
) -> list[PlacedBox]:
    """Return the boxes in an answer, in pixels of the original images.

    The n-th box is on the image of the n-th of ``references``, boxes beyond them on that of the last one, and
    without references on the first image. Boxes on images without a geometry are left out.

    Any ``[x1, y1, x2, y2]`` of whole numbers up to 1000 with x1 < x2 and y1 < y2 is a box, such as
    "[1, 2, 3, 4]", whether or not the model was trained on boxes.
    """
    placed = []
    for number, box in enumerate(parse_boxes(text)):
        image = references[min(number, len(references) - 1)].image if references else 0
        geometry = geometries[image] if image < len(geometries) else None
        if box is not None and geometry is not None:
            placed.append(PlacedBox(image, geometry.to_original(box)))
    return placed
