"""The verdict on a run: whether the model uses its images.

It compares answers with the true images and with those of another sample and, if it was measured, what the
same exchange does to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from flamingo_ft.formatting import percent

from .image_loss_gap import CLEARLY_ABOVE, ImageLossGap
from .metrics import ACCURACY, IOU_50, mean, normalize
from .questions import Question
from .reference_answers import by_task, is_free_text, majority_answers

MIN_QUESTIONS = 20  # with images; fewer allow no conclusion, neither on all nor on a task
SIGNIFICANT = 2.0  # standard errors
MIN_GAIN = 0.02  # smaller differences in accuracy are of no use, however significant
FEW_CHANGES = 0.1  # fraction of answers that change with the image
NOT_LOOKING, NO_USE = "the model is not looking", "the images are of no use to the model"
READS_IMAGES = "reads the images"
UNCLEAR = "whether the model uses its images is unclear"
LOOKS_ONLY = "the model looks at the images, but not enough to answer better"
SHOWN_TASKS = 5  # named in the verdict
REMEDY = (
    "train longer, raise train.learning_rates.gates, or use more varied questions that cannot be answered "
    "without the image"
)


def image_use(
    questions: Sequence[Question],
    predictions: Sequence[str],
    shuffled: Sequence[str],
    gap: ImageLossGap | None = None,
) -> str | None:
    """Return whether the model uses its images, in one sentence; None if no question has any.

    predictions: answers to the questions. shuffled: answers to the same questions with another sample's
    images. gap: what the same exchange of images does to the loss. Several tasks are also judged one by one,
    and the sentence names those in which the right image clearly helps.
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
    majority = mean(correctness(asked, majority_answers(asked)))
    tasks = _tasks_that_gain(asked, correct, correct_shuffled)
    return _verdict_on_scores(correct, correct_shuffled, tasks, changed, majority, gap)


def correctness(questions: Sequence[Question], answers: Sequence[str]) -> np.ndarray:
    """Return how right each answer is, 0..1: with boxes the share of them that is right, else exact match."""
    has_boxes = [bool(question.boxes) for question in questions]
    return np.where(has_boxes, IOU_50.measure(questions, answers), ACCURACY.measure(questions, answers))


def _tasks_that_gain(
    questions: Sequence[Question], correct: np.ndarray, shuffled: np.ndarray
) -> dict[str, bool]:
    """Return for each task whether its answers are clearly better with the right image.

    The error is allowed once for all tasks (Bonferroni), so that among many none is named by chance. Tasks of
    free text or with too few questions are left out.
    """
    tasks = {
        task: indices
        for task, indices in by_task(questions).items()
        if len(indices) >= MIN_QUESTIONS and not is_free_text([questions[index] for index in indices])
    }
    normal = NormalDist()
    errors = normal.inv_cdf(1 - normal.cdf(-SIGNIFICANT) / max(1, len(tasks)))
    return {task: _gains(correct[indices], shuffled[indices], errors) for task, indices in tasks.items()}


def _gains(correct: np.ndarray, shuffled: np.ndarray, errors: float = SIGNIFICANT) -> bool:
    """Whether scores of 0 or 1 are better with the right image, paired by question (McNemar, 1947).

    errors: the standard errors that a gain must exceed.
    """
    error = math.sqrt(((correct - shuffled) ** 2).sum()) / len(correct)
    return mean(correct) - mean(shuffled) > max(errors * error, MIN_GAIN)


def _verdict_on_scores(
    correct: np.ndarray,
    shuffled: np.ndarray,
    tasks: dict[str, bool],
    changed: float,
    majority: float,
    gap: ImageLossGap | None,
) -> str:
    """Compare scores of 0 or 1 with the true and with other images, of all questions and of each task."""
    score, other = mean(correct), mean(shuffled)
    figures = f"{percent(score)} right, against {percent(other)} with another image"
    if gap is not None:
        figures += f"; {gap.sentence}"
    if any(tasks.values()) and not all(tasks.values()):
        gaining, others = (_names(tasks, gains) for gains in (True, False))
        return f"{READS_IMAGES} in {gaining}; no clear gain from them in {others}: {figures}; {REMEDY}"
    if not _gains(correct, shuffled) and not any(tasks.values()):
        if gap is not None and gap.conclusion == CLEARLY_ABOVE:
            return f"{LOOKS_ONLY}: {figures}; {REMEDY}"
        if changed < FEW_CHANGES:
            return f"{NOT_LOOKING}: answers barely change with another image ({figures}); {REMEDY}"
        if score - other > MIN_GAIN:
            return f"{UNCLEAR}: {figures}, which may be chance; use more held-out questions, {REMEDY}"
        return (
            f"{NO_USE}: answers change with another image, but are right about as often ({figures}); {REMEDY}"
        )
    if len(tasks) > 1 and not any(tasks.values()):
        return f"{READS_IMAGES} a little, clearly in no single task: {figures}; {REMEDY}"
    if gap is not None and gap.conclusion != CLEARLY_ABOVE:
        return f"{READS_IMAGES}, yet the loss does not show it: {figures}; {REMEDY}"
    if score <= majority:
        baseline = f"always giving the most frequent answer ({percent(majority)})"
        return f"{READS_IMAGES}, yet does no better than {baseline}: {figures}; {REMEDY}"
    return f"{READS_IMAGES}: {figures}"


def _names(tasks: dict[str, bool], gains: bool) -> str:
    """Return the names of the tasks with or without a gain."""
    names = [task for task, its in tasks.items() if its == gains]
    further = f" and {len(names) - SHOWN_TASKS} more tasks" if len(names) > SHOWN_TASKS else ""
    return ", ".join(names[:SHOWN_TASKS]) + further


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
