"""Intersection over union of the boxes in answers, and its share above one half as RefCOCO's accuracy.

Boxes are compared as the model writes them, in fractions of what it sees: IoU is the same in pixels of the
original, since each axis is only scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from flamingo_ft.model.boxes import parse_boxes
from flamingo_ft.model.geometry import Corners, area

from .metric import Metric, mean, per_pair

CORRECT = 0.5  # IoU from which a box counts as right (Mao et al., 2016, arXiv:1511.02283)


def box_iou(first: Corners, second: Corners) -> float:
    """Return the area that two boxes share, divided by the area that they cover together, 0..1."""
    left, top = max(first[0], second[0]), max(first[1], second[1])
    right, bottom = min(first[2], second[2]), min(first[3], second[3])
    shared = area((left, top, right, bottom))
    return shared / (area(first) + area(second) - shared) if shared else 0.0


def answer_ious(prediction: str, reference: str) -> list[float]:
    """Return the IoU of each box of the reference with the predicted box at its place in the answer.

    In order and not in the best assignment: a box belongs to the words before it. A missing box has 0, and so
    has each predicted box beyond those of the reference.
    """
    predicted, expected = parse_boxes(prediction), [box for box in parse_boxes(reference) if box is not None]
    ious = [
        0.0 if box is None else box_iou(box, other) for box, other in zip(predicted, expected, strict=False)
    ]
    return ious + [0.0] * (max(len(predicted), len(expected)) - len(ious))


def of_answers(score: Callable[[list[float]], float]) -> Callable[[str, Sequence[str]], float]:
    """Return the score of an answer: the best over its reference answers with boxes; NaN without such."""

    def best(prediction: str, references: Sequence[str]) -> float:
        with_boxes = [reference for reference in references if any(parse_boxes(reference))]
        return max((score(answer_ious(prediction, one)) for one in with_boxes), default=math.nan)

    return best


def mean_iou(ious: list[float]) -> float:
    """Return the mean IoU of an answer's boxes."""
    return mean(ious)


def share_correct(ious: list[float]) -> float:
    """Return the share of an answer's boxes with an IoU of at least `CORRECT`."""
    return mean([iou >= CORRECT for iou in ious])


def mean_defined(scores: np.ndarray) -> float:
    """Return the mean over the answers that have a reference box; NaN without any."""
    defined = scores[~np.isnan(scores)]
    return mean(defined) if len(defined) else math.nan


IOU = Metric(
    "iou",
    per_pair(of_answers(mean_iou)),
    label="IoU",
    description="mean intersection over union of the boxes in answers and in reference answers, in order",
    aggregate=mean_defined,
    by_class=False,
    only="with boxes",
)
IOU_50 = Metric(
    "iou_50",
    per_pair(of_answers(share_correct)),
    label="box accuracy at IoU 0.5",
    description="share of boxes with an intersection over union of at least 0.5 with the reference (Acc@0.5)",
    aggregate=mean_defined,
    by_class=False,
    only="with boxes",
)
