"""ANLS, which forgives small misreadings of text in images."""

from __future__ import annotations

from collections.abc import Sequence

from .metric import Metric, per_pair
from .sequences import edit_distance

THRESHOLD = 0.5  # normalized distance from which an answer counts as wrong, not as misread


def anls(prediction: str, references: Sequence[str]) -> float:
    """Return the normalized Levenshtein similarity to the nearest reference answer, 0..1.

    1 - NL if NL < 0.5 and otherwise 0, where NL is the edit distance divided by the length of the longer
    text, without case and extra spaces (Biten et al., 2019, arXiv:1905.13648, equation 1).
    """
    answer = _normalize(prediction)
    return max(_similarity(answer, reference) for reference in {*map(_normalize, references)})


def _similarity(first: str, second: str) -> float:
    if first == second:
        return 1.0
    longer = max(len(first), len(second))
    if abs(len(first) - len(second)) >= THRESHOLD * longer:
        return 0.0
    distance = edit_distance(first, second) / longer
    return 1 - distance if distance < THRESHOLD else 0.0


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())


ANLS = Metric(
    "anls",
    per_pair(anls),
    label="ANLS",
    description="average normalized Levenshtein similarity of answers, threshold 0.5",
)
