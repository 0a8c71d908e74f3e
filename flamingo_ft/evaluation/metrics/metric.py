"""What a metric is: one statistic for each prediction, and how statistics become a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.questions import Question
from flamingo_ft.formatting import percent


@dataclass(frozen=True)
class Ranked:
    """A prediction that ranks labels instead of being generated.

    scores: label -> score, such as its log-likelihood; the highest is the answer, the first of them on a tie.
    """

    scores: Mapping[str, float]

    def __str__(self) -> str:
        return max(self.scores, key=self.scores.__getitem__)


Prediction = str | Ranked
References = Sequence[Sequence[str]]  # the reference answers of each prediction
StatisticsFunction = Callable[[Sequence[Any], Sequence[Sequence[Any]]], np.ndarray]
Aggregate = Callable[[np.ndarray], float]


def mean(scores: Sequence[float] | np.ndarray) -> float:
    """Return the arithmetic mean."""
    return float(np.mean(scores))


def per_pair(score: Callable[[Any, Sequence[Any]], float]) -> StatisticsFunction:
    """Return the statistics of a metric that scores each prediction by itself.

    score: (prediction, its reference answers) -> its score.
    """

    def statistics(predictions: Sequence[Any], references: Sequence[Sequence[Any]]) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([score(prediction, answers) for prediction, answers in pairs], dtype=np.float64)

    return statistics


def capitalized(label: str) -> str:
    """Return a label with a capital at its beginning."""
    return label[:1].upper() + label[1:]


@dataclass(frozen=True)
class Metric:
    """One way to score answers.

    name: key in metrics.json, in the log (``eval_<name>``) and in the recipe (``eval.metrics``).
    statistics: (predictions, reference answers of each) -> array (N predictions, ...), the statistic of each
        prediction: its score (`per_pair`), or the counts that a corpus metric adds up.
    label: name in tables and figures (titles capitalize it).
    description: phrase for the model card that says what is measured; by default the label.
    aggregate: statistics, of all predictions or of a resample of them -> value of the metric; NaN where it is
        not defined.
    higher_is_better: whether larger values are better; decides the best checkpoint and merging.
    format: value -> text; `percent`, the default, means that values are fractions in 0..1.
    axis: label of the figure's y axis; by default the label.
    hub_type: identifier of the metric on the Hugging Face Hub; by default the name.
    merge_margin: how much worse than its adapter a merged model may be; None: reported, but not checked.
    ranked: whether predictions have to be `Ranked`; otherwise statistics are computed on their text.
    by_class: whether it means anything on the questions of a single reference answer.
    of_corpus: whether a statistic depends on the other predictions or their references, so that those of a
        part of the questions have to be computed anew.
    only: the questions that it is defined on, in words: ``with boxes``; by default all. The statistic of any
        other is NaN, and it does not count.
    of_boxes: the metric that scores answers to questions with boxes in its place, if there is one.
    """

    name: str
    statistics: StatisticsFunction
    label: str
    description: str = ""
    aggregate: Aggregate = mean
    higher_is_better: bool = True
    format: Callable[[float], str] = percent
    axis: str = ""
    hub_type: str = ""
    merge_margin: float | None = None
    ranked: bool = False
    by_class: bool = True
    of_corpus: bool = False
    only: str = ""
    of_boxes: Metric | None = None

    def measure(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> np.ndarray:
        """Return the statistic of each prediction.

        Raises UserError if labels have to be ranked and the answers are generated.
        """
        if not self.ranked:
            predictions = [str(prediction) for prediction in predictions]
        elif any(isinstance(prediction, str) for prediction in predictions):
            raise UserError(
                f"{self.name}: needs a score for each label, got generated answers; "
                "use a metric of answers, such as accuracy or f1"
            )
        statistics = self.statistics(predictions, [question.references for question in questions])
        if self.of_boxes is None or not any(question.boxes for question in questions):
            return statistics
        of_boxes = self.of_boxes.measure(questions, predictions)
        has_boxes = np.array([bool(question.boxes) for question in questions])
        return np.where(has_boxes & ~np.isnan(of_boxes), of_boxes, statistics)

    def count(self, statistics: np.ndarray) -> int:
        """Return the number of questions that the metric is defined on."""
        return int((~np.isnan(statistics)).sum()) if self.only else len(statistics)

    def value(self, statistics: np.ndarray) -> float | None:
        """Return the value of the metric; None where it is not defined, or without predictions."""
        value = float(self.aggregate(statistics)) if len(statistics) else math.nan
        return None if math.isnan(value) else value

    def evaluate(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> float | None:
        """Return the value of the metric over all predictions; None where it is not defined."""
        return self.value(self.measure(questions, predictions))

    @property
    def title(self) -> str:
        """The label, capitalized."""
        return capitalized(self.label)

    def label_with(self, boxes: int) -> str:
        """Return the label for scores of questions some of which have boxes, and how those are scored."""
        if not boxes or self.of_boxes is None:
            return self.label
        return f"{self.label} (with boxes: {self.of_boxes.label})"

    @property
    def is_fraction(self) -> bool:
        """Whether values lie in 0..1 and are shown in percent."""
        return self.format is percent

    def text(self, value: float | None) -> str:
        """Return a value as text, such as ``42.0 %``; empty for None."""
        return "" if value is None else self.format(value)
