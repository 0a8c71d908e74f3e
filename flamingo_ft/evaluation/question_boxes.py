"""The boxes of a question: those that it asks about, of its reference answer and of an answer, in pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.data.boxes import PlacedBox, placed_boxes
from flamingo_ft.data.drawing import ASKED, PREDICTED, REFERENCE, DrawnBox
from flamingo_ft.data.sample import Box

from .questions import Question


def boxes_by_kind(question: Question, answer: str) -> dict[str, list[PlacedBox]]:
    """Return the boxes of a question and an answer by kind, for a question of a sample with boxes."""
    return {
        ASKED: _placed(question, question.asked),
        REFERENCE: _placed(question, question.boxes),
        PREDICTED: placed_boxes(answer, question.geometries, question.boxes),
    }


def drawn_on(question: Question, answer: str, image: int) -> list[DrawnBox]:
    """Return the boxes to draw on one of a question's images."""
    kinds = boxes_by_kind(question, answer)
    return [(box.box, kind) for kind, boxes in kinds.items() for box in boxes if box.image == image]


def boxes_record(question: Question, answers: Mapping[str, str]) -> dict[str, Any]:
    """Return what predictions.jsonl says of the boxes of a question; {} for a sample without boxes.

    ``boxes``: lists of objects ``image``, ``box`` in pixels, for what is asked about, the reference and the
    answers by condition. ``image_sizes``: width and height in pixels; None for images without boxes.
    """
    if not question.geometries:
        return {}
    kinds = {
        kind: _placed(question, boxes)
        for kind, boxes in ((ASKED, question.asked), (REFERENCE, question.boxes))
    }
    kinds |= {name: placed_boxes(text, question.geometries, question.boxes) for name, text in answers.items()}
    sizes = [geometry and geometry.original_size for geometry in question.geometries]
    return {
        "boxes": {kind: [_record(box) for box in boxes] for kind, boxes in kinds.items()},
        "image_sizes": sizes,
    }


def _placed(question: Question, boxes: Sequence[Box]) -> list[PlacedBox]:
    placed = []
    for box in boxes:
        geometry = question.geometries[box.image] if box.image < len(question.geometries) else None
        if geometry is not None:
            placed.append(PlacedBox(box.image, box.pixels(*geometry.original_size)))
    return placed


def _record(placed: PlacedBox) -> dict[str, Any]:
    return {"image": placed.image, "box": [round(side, 1) for side in placed.box]}
