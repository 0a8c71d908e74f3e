"""Whether a model uses its images: its answers against those to the same questions with other images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flamingo_ft.formatting import percent

from .metrics import ACCURACY, is_free_text, mean, normalize
from .questions import Question

MIN_QUESTIONS = 20  # with images; fewer allow no conclusion
SIGNIFICANT = 2.0  # standard errors
MIN_GAIN = 0.02  # smaller differences in accuracy are of no use, however significant
FEW_CHANGES = 0.1  # fraction of answers that change with the image
NOT_LOOKING, NO_USE = "the model is not looking", "the images are of no use to the model"
READS_IMAGES = "reads the images"
REMEDY = (
    "try more steps, a higher train.learning_rate (above all for the gates), a smaller "
    "model.cross_attn_every_n_layers, or more varied questions that cannot be answered without the image"
)


def image_use(
    questions: Sequence[Question],
    predictions: Sequence[str],
    shuffled: Sequence[str],
) -> str | None:
    """Return whether the model uses its images, in one sentence; None if no question has any.

    predictions: answers to the questions. shuffled: answers to the same questions with another sample's
    images.
    """
    rows = [row for row in zip(questions, predictions, shuffled, strict=True) if row[0].images]
    if not rows:
        return None
    if len(rows) < MIN_QUESTIONS:
        return f"too few held-out questions with images to judge by ({len(rows)}; {MIN_QUESTIONS} are needed)"
    asked = [question for question, _, _ in rows]
    changed = mean([normalize(prediction) != normalize(other) for _, prediction, other in rows])
    if is_free_text(asked):
        return _verdict_on_free_text(changed)
    correct = ACCURACY.scores(asked, [prediction for _, prediction, _ in rows])
    correct_shuffled = ACCURACY.scores(asked, [other for _, _, other in rows])
    return _verdict_on_scores(correct, correct_shuffled, changed, ACCURACY.majority_baseline(asked))


def _verdict_on_scores(
    correct: Sequence[float], shuffled: Sequence[float], changed: float, majority: float
) -> str:
    """Compare scores of 0 or 1 with the true and with other images, paired by question (McNemar, 1947)."""
    score, other = mean(correct), mean(shuffled)
    gain = score - other
    error = math.sqrt(sum((a - b) ** 2 for a, b in zip(correct, shuffled, strict=True))) / len(correct)
    figures = f"{percent(score)} right, against {percent(other)} with another image"
    if gain <= max(SIGNIFICANT * error, MIN_GAIN):
        if changed < FEW_CHANGES:
            return f"{NOT_LOOKING}: answers barely change with another image ({figures}); {REMEDY}"
        return (
            f"{NO_USE}: answers change with another image, but are right about as often ({figures}); {REMEDY}"
        )
    if score <= majority:
        baseline = f"always giving the most frequent answer ({percent(majority)})"
        return f"{READS_IMAGES}, yet does no better than {baseline}: {figures}; {REMEDY}"
    return f"{READS_IMAGES}: {figures}"


def _verdict_on_free_text(changed: float) -> str:
    share = f"{100 * changed:.0f} % of the answers change with another image"
    if changed < FEW_CHANGES:
        return f"{NOT_LOOKING}: {share}; {REMEDY}"
    limit = "whether they are right, exact match cannot tell for free text"
    return f"the answers depend on the images ({share}); {limit}"
