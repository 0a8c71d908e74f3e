"""Boxes as the model reads and writes them: ``[x1, y1, x2, y2]`` in plain text, without special tokens.

The numbers are whole, from 0 to `UNITS`, and of what the model sees: 0 is its left or upper border, `UNITS`
its right or lower one.
"""

from __future__ import annotations

import re

from .geometry import Corners

UNITS = 1000
WIDEST = f"[{UNITS}, {UNITS}, {UNITS}, {UNITS}]"
_BOX = re.compile(r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]", re.ASCII)


def box_text(box: Corners) -> str:
    """Return a box, in fractions of what the model sees, as text; it is at least one unit wide and high."""
    left, top, right, bottom = box
    (x1, x2), (y1, y2) = _side(left, right), _side(top, bottom)
    return f"[{x1}, {y1}, {x2}, {y2}]"


def parse_boxes(text: str) -> list[Corners | None]:
    """Return the boxes in a text, in order and as fractions of what the model sees.

    None stands for four numbers that are no box: beyond `UNITS`, or a side that ends before it begins.
    """
    return [_box(match) for match in _BOX.finditer(text)]


def without_boxes(text: str) -> str:
    """Return the text without its boxes."""
    return _BOX.sub("", text)


def _side(begin: float, end: float) -> tuple[int, int]:
    first = min(round(begin * UNITS), UNITS - 1)
    return first, max(round(end * UNITS), first + 1)


def _box(match: re.Match[str]) -> Corners | None:
    x1, y1, x2, y2 = map(int, match.groups())
    if not (x1 < x2 <= UNITS and y1 < y2 <= UNITS):
        return None
    return x1 / UNITS, y1 / UNITS, x2 / UNITS, y2 / UNITS
