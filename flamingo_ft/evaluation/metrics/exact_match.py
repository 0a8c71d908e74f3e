"""Accuracy: exact match after a light normalization, and of answers with boxes their share that is right."""

from __future__ import annotations

from collections.abc import Sequence

from .boxes import IOU_50
from .metric import Metric, per_pair


def normalize(text: str) -> str:
    """Return an answer as exact match compares it: case, extra spaces and final punctuation removed."""
    return " ".join(text.casefold().split()).rstrip(".!? ")


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference answer after `normalize`."""
    return normalize(prediction) in map(normalize, references)


ACCURACY = Metric(
    "accuracy",
    per_pair(exact_match),
    label="accuracy",
    description="exact match of greedy answers",
    axis="correct answers",
    hub_type="exact_match",
    merge_margin=0.1,
    of_boxes=IOU_50,
)
