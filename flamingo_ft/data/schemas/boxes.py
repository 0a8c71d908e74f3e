"""The ``boxes`` column, and the markers ``<box>`` that stand for its boxes in the texts of a row.

{"question": "What is at <box>?", "answer": "A heron.", "image": "1.jpg", "boxes": [[20, 30, 180, 240]]}
{"question": "Where is the heron?", "answer": "<box>", "image": "1.jpg", "boxes": [[20, 30, 180, 240]]}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flamingo_ft.data.fields import Row, has_value, list_field, type_name
from flamingo_ft.data.sample import BOX_MARKER, Box, Medium, Video
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural

BOXES = "boxes"
SIDES = "[x1, y1, x2, y2]"
ROUNDING = 1e-6  # that a fraction may exceed 1 by

BoxUnit = Literal["pixels", "relative"]


@dataclass(frozen=True)
class BoxPart:
    """Where a box belongs in a text. index: its place in the column."""

    index: int


def boxes_of(row: Row, unit: BoxUnit, where: str) -> list[Box] | None:
    """Return the boxes of a row; None without the column, where ``<box>`` is text.

    Raises UserError for one that is not a box, whatever its image.
    """
    if BOXES not in row:
        return None
    values = list_field(row, BOXES, where) if has_value(row, BOXES) else []
    return [_box(value, unit, f"{where}: {BOXES}[{index}]") for index, value in enumerate(values)]


def split_markers(parts: Sequence[Any], numbers: Iterator[int]) -> list[Any]:
    """Return the parts of a content with a `BoxPart` for each marker. numbers: indices of the next boxes."""
    return [piece for part in parts for piece in (_split(part, numbers) if isinstance(part, str) else [part])]


def check_boxes(boxes: Sequence[Box], markers: int, media: Sequence[Medium], where: str) -> None:
    """Raise UserError unless there is a marker for each box, and an image."""
    if markers != len(boxes):
        raise UserError(
            f"{where}: {BOXES}: got {plural(markers, f'{BOX_MARKER} marker')} but {len(boxes)} boxes; "
            "write one marker for each, in their order"
        )
    for box in boxes:
        if box.image >= len(media):
            raise UserError(
                f"{box.where}: no such image, got number {box.image} in a row of "
                f"{plural(len(media), 'image')}; count them from 0"
            )
        if isinstance(media[box.image], Video):
            raise UserError(f"{box.where}: not supported on videos, got image {box.image}; use an image")


def refuse_markers(texts: Sequence[str], where: str) -> None:
    """Raise UserError for a marker in a further reference answer, whose box would be unknown."""
    if any(BOX_MARKER in text for text in texts):
        raise UserError(f"{where}: {BOX_MARKER} in one of several reference answers; give the row one answer")


def _split(text: str, numbers: Iterator[int]) -> Iterator[str | BoxPart]:
    first, *others = text.split(BOX_MARKER)
    if first or not others:
        yield first
    for other in others:
        yield BoxPart(next(numbers))
        if other:
            yield other


def _box(value: Any, unit: BoxUnit, where: str) -> Box:
    image = 0
    if isinstance(value, Mapping):
        image = _image(value.get("image"), where)
        value, where = value.get("box"), f"{where}.box"
    if not isinstance(value, (list, tuple)) or len(value) != len(SIDES.split()):
        got = plural(len(value), "value") if isinstance(value, (list, tuple)) else type_name(value)
        raise UserError(f"{where}: expected {SIDES}, got {got}")
    left, top, right, bottom = (_number(side, where) for side in value)
    box = Box((left, top, right, bottom), image, unit == "relative", where)
    _check_corners(box)
    return box


def _number(side: Any, where: str) -> float:
    if not isinstance(side, (int, float)) or isinstance(side, bool) or not math.isfinite(side):
        got = repr(side) if isinstance(side, float) else type_name(side)
        raise UserError(f"{where}: expected {SIDES} of finite numbers, got {got}")
    return float(side)


def _image(value: Any, where: str) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        got = value if isinstance(value, int) else type_name(value)
        raise UserError(f"{where}.image: expected the number of an image, from 0, got {got}")
    return value


def _check_corners(box: Box) -> None:
    """Raise UserError for sides in the wrong order, and for numbers that are not in the source's unit."""
    left, top, right, bottom = box.corners
    got = f"got {[*box.corners]}"
    if right <= left or bottom <= top:
        raise UserError(f"{box.where}: expected {SIDES} with x1 < x2 and y1 < y2, {got}")
    if box.is_relative and (min(box.corners) < 0 or max(box.corners) > 1 + ROUNDING):
        raise UserError(f"{box.where}: expected fractions from 0 to 1, {got}; set box_unit to pixels")
    if not box.is_relative and max(box.corners) <= 1:
        raise UserError(f"{box.where}: smaller than a pixel, {got}; set box_unit to relative")
