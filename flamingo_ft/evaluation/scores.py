"""Metrics of the same questions' answers under several conditions, over all of them and over parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
        statistics = self.statistics[metric.name][condition]
        if indices is None:
            return metric.value(statistics)
        if not metric.of_corpus:
            return metric.value(statistics[np.asarray(indices)])
        predictions = self.answers[condition]
        return metric.evaluate([self.questions[i] for i in indices], [predictions[i] for i in indices])
