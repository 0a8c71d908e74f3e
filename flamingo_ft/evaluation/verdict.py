"""Whether a model reads its images, in a sentence: its answers against those with other images in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flamingo_ft.formatting import percent

from .accuracy import is_right, normalise
from .baselines import is_free_text, majority
from .questions import Question

LEAST_QUESTIONS = 20  # with images, below which nothing is concluded
CLEAR = 2.0  # standard errors
LEAST_GAIN = 0.02  # of accuracy, below which a difference is of no use, however certain
BARELY = 0.1  # share of answers that change with the image
NOT_LOOKING, NO_USE = "the model is not looking", "the images are of no use to the model"
REMEDY = (
    "try more steps, a higher train.learning_rate (above all for the gates), a smaller model.cross_attn_every_n_layers, or "
    "more varied questions that cannot be answered without the image"
)


def verdict(questions: Sequence[Question], answers: Sequence[str], shuffled: Sequence[str]) -> str | None:
    """One sentence on the questions that have images; None where there are none.

    answers: to the questions. shuffled: to the same, with another sample's images.
    """
    rows = [row for row in zip(questions, answers, shuffled, strict=True) if row[0].images]
    if not rows:
        return None
    if len(rows) < LEAST_QUESTIONS:
        return (
            f"too few held-out questions with images to judge by ({len(rows)}; {LEAST_QUESTIONS} are needed)"
        )
    asked = [question for question, *_ in rows]
    changed = sum(normalise(answer) != normalise(other) for _, answer, other in rows) / len(rows)
    if is_free_text(asked):
        return _of_free_text(changed)
    outcomes = [(is_right(question, answer), is_right(question, other)) for question, answer, other in rows]
    return _of_accuracies(outcomes, changed, majority(asked))


def _of_accuracies(outcomes: Sequence[tuple[bool, bool]], changed: float, baseline: float) -> str:
    """outcomes: right with the true images, right with others; a paired comparison (McNemar, 1947)."""
    right, other = (sum(column) / len(outcomes) for column in zip(*outcomes, strict=True))
    gain, error = right - other, math.sqrt(sum(a != b for a, b in outcomes)) / len(outcomes)
    figures = f"{percent(right)} right, against {percent(other)} with another image"
    if gain <= max(CLEAR * error, LEAST_GAIN):
        if changed < BARELY:
            return f"{NOT_LOOKING}: answers barely change with another image ({figures}); {REMEDY}"
        return (
            f"{NO_USE}: answers change with another image, but are right about as often ({figures}); {REMEDY}"
        )
    if right <= baseline:
        return f"reads the images, yet does no better than always giving the most frequent answer ({percent(baseline)}): {figures}; {REMEDY}"
    return f"reads the images: {figures}"


def _of_free_text(changed: float) -> str:
    share = f"{percent(changed, digits=0)} of the answers change with another image"
    if changed < BARELY:
        return f"{NOT_LOOKING}: {share}; {REMEDY}"
    return f"the answers depend on the images ({share}); whether they are right, exact match cannot tell for free text"
