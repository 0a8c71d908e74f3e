"""Which metrics a run computes: those that its recipe names, or those that fit its reference answers."""

from __future__ import annotations

from collections.abc import Sequence

from flamingo_ft.config import EvalSection
from flamingo_ft.config.metric_names import LOSS, is_user_metric

from .metrics import METRICS, Metric, find_metrics
from .questions import Question
from .reference_answers import has_free_text

DEFAULT = ("accuracy",)
FREE_TEXT = ("rouge_l", "cider_d")  # beside them, if a task has free text
BOXES = ("iou", "iou_50")  # beside them, if a reference answer has boxes


def select_metrics(
    evaluation: EvalSection, questions: Sequence[Question], more: Sequence[str] = ()
) -> list[Metric]:
    """Return the metrics to score answers by: those of ``eval.metrics`` and ``eval.metric``, and ``more``.

    Each is tried on the first question, so that one that cannot be computed is refused before the model is
    loaded. Raises UserError for one that needs what is not installed or not known, and for a user's
    function that is not there or fails.
    """
    if not questions:
        return []
    metrics, first = find_metrics([*_names(evaluation, questions), *more]), questions[0]
    for metric in metrics:
        metric.evaluate([first], [first.answer])
    return metrics


def _names(evaluation: EvalSection, questions: Sequence[Question]) -> list[str]:
    names = evaluation.metrics
    if names is None:
        boxes = BOXES if any(question.boxes for question in questions) else ()
        names = (*DEFAULT, *boxes, *(FREE_TEXT if has_free_text(questions) else ()))
    return [*names, *([] if evaluation.metric == LOSS else [evaluation.metric])]


def known_metrics(evaluation: EvalSection) -> list[Metric]:
    """Return every metric that the log of a run may have values of: registered ones, and its users'."""
    users = filter(is_user_metric, [*(evaluation.metrics or ()), evaluation.metric])
    return [*METRICS.values(), *find_metrics(users)]


def higher_is_better(name: str) -> bool:
    """Return whether larger values of what ``eval.metric`` names are better."""
    return name != LOSS and find_metrics([name])[0].higher_is_better
