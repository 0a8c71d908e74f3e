"""The verdict on a run: whether the model uses its images.

It compares answers with the true images and with those of another sample and, if it was measured, what the
same exchange does to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flamingo_ft.formatting import percent

from .image_loss_gap import CLEARLY_ABOVE, ImageLossGap
from .metrics import ACCURACY, IOU_50, mean, normalize
from .questions import Question
from .reference_answers import is_free_text, most_frequent_answer

MIN_QUESTIONS = 20  # with images; fewer allow no conclusion
SIGNIFICANT = 2.0  # standard errors
MIN_GAIN = 0.02  # smaller differences in accuracy are of no use, however significant
FEW_CHANGES = 0.1  # fraction of answers that change with the image
NOT_LOOKING, NO_USE = "the model is not looking", "the images are of no use to the model"
READS_IMAGES = "reads the images"
LOOKS_ONLY = "the model looks at the images, but not enough to answer better"
REMEDY = (
    "train longer, raise train.learning_rates.gates, lower "
    "model.cross_attn_every_n_layers, or use more varied questions that cannot be answered without the image"
)


def image_use(
    questions: Sequence[Question],
    predictions: Sequence[str],
    shuffled: Sequence[str],
    gap: ImageLossGap | None = None,
) -> str | None:
    """Return whether the model uses its images, in one sentence; None if no question has any.

    predictions: answers to the questions. shuffled: answers to the same questions with another sample's
    images. gap: what the same exchange of images does to the loss.
    """
    if gap is not None and gap.conclusion is None:
        gap = None
    rows = [row for row in zip(questions, predictions, shuffled, strict=True) if row[0].images]
    if not rows:
        return None
    if len(rows) < MIN_QUESTIONS:
        return f"too few held-out questions with images to judge by ({len(rows)}; {MIN_QUESTIONS} are needed)"
    asked = [question for question, _, _ in rows]
    changed = mean([normalize(prediction) != normalize(other) for _, prediction, other in rows])
    if is_free_text(asked):
        return _verdict_on_free_text(changed, gap)
    correct = correctness(asked, [prediction for _, prediction, _ in rows])
    correct_shuffled = correctness(asked, [other for _, _, other in rows])
    majority = correctness(asked, [most_frequent_answer(asked)] * len(asked))
    return _verdict_on_scores(correct, correct_shuffled, changed, mean(majority), gap)


def correctness(questions: Sequence[Question], answers: Sequence[str]) -> np.ndarray:
    """Return how right each answer is, 0..1: with boxes the share of them that is right, else exact match."""
    has_boxes = [bool(question.boxes) for question in questions]
    return np.where(has_boxes, IOU_50.measure(questions, answers), ACCURACY.measure(questions, answers))


def _verdict_on_scores(
    correct: np.ndarray,
    shuffled: np.ndarray,
    changed: float,
    majority: float,
    gap: ImageLossGap | None,
) -> str:
    """Compare scores of 0 or 1 with the true and with other images, paired by question (McNemar, 1947)."""
    score, other = mean(correct), mean(shuffled)
    gain = score - other
    error = math.sqrt(((correct - shuffled) ** 2).sum()) / len(correct)
    figures = f"{percent(score)} right, against {percent(other)} with another image"
    if gap is not None:
        figures += f"; {gap.sentence}"
    if gain <= max(SIGNIFICANT * error, MIN_GAIN):
        if gap is not None and gap.conclusion == CLEARLY_ABOVE:
            return f"{LOOKS_ONLY}: {figures}; {REMEDY}"
        if changed < FEW_CHANGES:
            return f"{NOT_LOOKING}: answers barely change with another image ({figures}); {REMEDY}"
        return (
            f"{NO_USE}: answers change with another image, but are right about as often ({figures}); {REMEDY}"
        )
    if gap is not None and gap.conclusion != CLEARLY_ABOVE:
        return f"{READS_IMAGES}, yet the loss does not show it: {figures}; {REMEDY}"
    if score <= majority:
        baseline = f"always giving the most frequent answer ({percent(majority)})"
        return f"{READS_IMAGES}, yet does no better than {baseline}: {figures}; {REMEDY}"
    return f"{READS_IMAGES}: {figures}"


def _verdict_on_free_text(changed: float, gap: ImageLossGap | None) -> str:
    """Judge by the loss if it was measured: exact match cannot tell which free text is right."""
    share = f"{100 * changed:.0f} % of the answers change with another image"
    if gap is not None and gap.conclusion == CLEARLY_ABOVE:
        return f"{READS_IMAGES}: {gap.sentence}; {share}"
    figures = share if gap is None else f"{share}; {gap.sentence}"
    if changed < FEW_CHANGES:
        return f"{NOT_LOOKING}: {figures}; {REMEDY}"
    if gap is not None:
        return (
            f"{NO_USE}: its answers change with another image ({100 * changed:.0f} %), but the reference "
            f"answers are about as likely with it ({gap.sentence}); {REMEDY}"
        )
    limit = "exact match cannot judge whether free-text answers are right"
    return f"the answers depend on the images ({share}); {limit}"
