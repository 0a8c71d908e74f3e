"""F1, area under the ROC curve and top-k accuracy, for tasks with few answers and for ranked labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from flamingo_ft.errors import UserError

from .exact_match import exact_match, normalize
from .metric import Metric, Ranked, References, per_pair

POSITIVE = frozenset(("yes", "true"))  # normalized answers of the positive class of a yes-or-no task
TOP = 5


def f1_counts(predictions: Sequence[str], references: References) -> np.ndarray:
    """Return whether each answer is a true positive, a false positive and a miss of the class yes (N, 3)."""
    found = np.array([normalize(prediction) in POSITIVE for prediction in predictions])
    positive = np.array([normalize(answers[0]) in POSITIVE for answers in references])
    return np.stack([found & positive, found & ~positive, ~found & positive], axis=1).astype(np.float64)


def f1(counts: np.ndarray) -> float:
    """Return F1 = 2 TP / (2 TP + FP + FN), 0..1, of the answers yes and true (van Rijsbergen, 1979).

    NaN if no prediction and no reference answer is one of them.
    """
    true, false, missed = counts.sum(axis=0).tolist()
    total = 2 * true + false + missed
    return 2 * true / total if total else math.nan


def class_pairs(predictions: Sequence[str], references: References) -> np.ndarray:
    """Return the classes (N, 2) of the reference and of the prediction; -1 is an answer of no class.

    The classes are the distinct reference answers. A prediction that equals any reference answer of its
    question is of that question's class.
    """
    numbers: dict[str, int] = {}
    expected = [numbers.setdefault(normalize(answers[0]), len(numbers)) for answers in references]
    given = [
        number if exact_match(prediction, answers) else numbers.get(normalize(prediction), -1)
        for prediction, answers, number in zip(predictions, references, expected, strict=True)
    ]
    return np.stack([expected, given], axis=1).astype(np.float64)


def macro_f1(classes: np.ndarray) -> float:
    """Return the mean of the F1 of every class that occurs among the reference answers, 0..1."""
    expected, given = classes[:, 0], classes[:, 1]
    scores = []
    for one in np.unique(expected):
        found, positive = given == one, expected == one
        scores.append(2 * (found & positive).sum() / (found.sum() + positive.sum()))
    return float(np.mean(scores))


def score_and_label(predictions: Sequence[Ranked], references: References) -> np.ndarray:
    """Return, for a ranking of two labels, by how much the second leads, and whether it is right (N, 2)."""
    first, second = _two_labels(predictions)
    leads = [ranked.scores[second] - ranked.scores[first] for ranked in predictions]
    is_second = [exact_match(second, answers) for answers in references]
    return np.stack([np.array(leads, dtype=np.float64), np.array(is_second, dtype=np.float64)], axis=1)


def _two_labels(predictions: Sequence[Ranked]) -> tuple[str, str]:
    labels = sorted({label for ranked in predictions for label in ranked.scores})
    if len(labels) != 2 or any(len(ranked.scores) != 2 for ranked in predictions):
        raise UserError(f"roc_auc: needs scores of the same two labels, got {len(labels)}; use top_{TOP}")
    return labels[0], labels[1]


def roc_auc(statistics: np.ndarray) -> float:
    """Return the area under the ROC curve from `score_and_label`, 0..1; chance is 0.5.

    The probability that a right second label leads by more than a wrong one does, ties counting half (Mann
    and Whitney, 1947; Hanley and McNeil, 1982). Which of the labels is called the second changes nothing. NaN
    if only one label occurs among the reference answers.
    """
    scores, positive = statistics[:, 0], statistics[:, 1] > 0
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return math.nan
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = ties.cumsum() - (ties - 1) / 2  # from 1; equal scores share the mean of their ranks
    above = ranks[place][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def in_top(k: int) -> Callable[[Ranked, Sequence[str]], float]:
    """Return the score of a ranking: 1 if a reference answer is among its k best labels, otherwise 0."""

    def score(ranked: Ranked, references: Sequence[str]) -> float:
        best = sorted(ranked.scores, key=ranked.scores.__getitem__, reverse=True)[:k]
        return float(any(exact_match(label, references) for label in best))

    return score


F1 = Metric("f1", f1_counts, label="F1", description="F1 of the answer yes", aggregate=f1, by_class=False)
MACRO_F1 = Metric(
    "macro_f1",
    class_pairs,
    label="macro F1",
    description="mean F1 of the reference answers as classes",
    aggregate=macro_f1,
    hub_type="f1",
    by_class=False,
)
ROC_AUC = Metric(
    "roc_auc",
    score_and_label,
    label="ROC AUC",
    description="area under the ROC curve of two ranked labels",
    aggregate=roc_auc,
    ranked=True,
    by_class=False,
)
TOP_5 = Metric(
    f"top_{TOP}",
    per_pair(in_top(TOP)),
    label=f"top-{TOP} accuracy",
    description=f"reference answer among the {TOP} best ranked labels",
    hub_type="accuracy",
    ranked=True,
)
