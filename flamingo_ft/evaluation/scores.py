"""Metrics of the same questions' answers under several conditions, over all of them and over parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .bootstrap import Interval, bootstrap_difference, bootstrap_interval
from .metrics import Metric, Prediction
from .questions import Question


@dataclass(frozen=True)
class Scores:
    """Statistics of every answer, computed once; a part of the questions takes its own of them.

    answers: predictions by condition. statistics: by name of the metric, then by condition.
    """

    questions: Sequence[Question]
    answers: Mapping[str, Sequence[Prediction]]
    statistics: Mapping[str, Mapping[str, np.ndarray]]

    @classmethod
    def of(
        cls,
        metrics: Sequence[Metric],
        questions: Sequence[Question],
        answers: Mapping[str, Sequence[Prediction]],
        baselines: Mapping[str, Sequence[str]],
    ) -> Scores:
        """Measure the answers by each metric. baselines: answers without scores of labels."""
        everything = {**answers, **baselines}
        statistics: dict[str, dict[str, np.ndarray]] = {metric.name: {} for metric in metrics}
        for condition, predictions in everything.items():  # the metrics share its tokens
            for metric in metrics:
                if condition in answers or not metric.ranked:
                    statistics[metric.name][condition] = metric.measure(questions, predictions)
        return cls(questions, everything, statistics)

    def value(self, metric: Metric, condition: str, indices: Sequence[int] | None = None) -> float | None:
        """Return the value of a metric over the questions at ``indices``, by default over all.

        None where it is not defined.
        """
        return metric.value(self.select(metric, condition, indices))

    def count(self, metric: Metric, indices: Sequence[int] | None = None) -> int:
        """Return how many of the questions at ``indices``, by default of all, a metric is defined on."""
        return metric.count(self.select(metric, next(iter(self.statistics[metric.name])), indices))

    def select(self, metric: Metric, condition: str, indices: Sequence[int] | None = None) -> np.ndarray:
        """Return the statistics of the questions at ``indices``, by default of all."""
        statistics = self.statistics[metric.name][condition]
        if indices is None:
            return statistics
        if not metric.of_corpus:
            return statistics[np.asarray(indices)]
        predictions = self.answers[condition]
        return metric.measure([self.questions[i] for i in indices], [predictions[i] for i in indices])


def score_record(metric: Metric, statistics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return a metric's ``value`` with its 95 % bootstrap interval, ``low`` and ``high``.

    statistics: by condition, the main one first. ``controls``: of each further condition its ``value`` and
    ``difference``, which is paired by question. What is not defined is None.
    """
    main, *others = statistics
    record = interval_record(bootstrap_interval(statistics[main], metric.aggregate))
    controls = {
        condition: {
            "value": metric.value(statistics[condition]),
            "difference": interval_record(
                bootstrap_difference(statistics[main], statistics[condition], metric.aggregate)
            ),
        }
        for condition in others
    }
    return {**record, "controls": controls} if controls else record


def interval_record(interval: Interval) -> dict[str, float | None]:
    """Return an interval for JSON, which has no NaN."""
    return {name: None if math.isnan(number) else number for name, number in asdict(interval).items()}
