"""Bootstrap intervals: how far a metric may be off because these questions were asked and no others.

    bootstrap_interval(metric.measure(questions, answers), metric.aggregate)

The questions are drawn again with replacement, and the value is computed from their statistics, which are not
recomputed. The interval is that of percentiles (Efron, 1979).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .metrics.metric import Aggregate, mean

RESAMPLES = 1_000
CONFIDENCE = 0.95
MAX_INDICES = 2**22  # drawn at once; 32 MB


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    statistics: np.ndarray,
    aggregate: Aggregate = mean,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the value of a metric and its interval.

    statistics: of N predictions (N, ...). aggregate: that of the metric. Resamples on which the metric is not
    defined (NaN) are left out. Raises ValueError without predictions.
    """
    _check(statistics)
    values = _resampled(statistics, aggregate, resamples, seed)
    return _interval(float(aggregate(statistics)), values, confidence)


def bootstrap_difference(
    first: np.ndarray,
    second: np.ndarray,
    aggregate: Aggregate = mean,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the value of the second condition minus that of the first, and the interval of that difference.

    first, second: statistics of the answers to the same questions under two conditions. The same questions
    are drawn for both, so what is hard about them cancels. Raises ValueError for different numbers.
    """
    _check(first)
    if len(first) != len(second):
        raise ValueError(f"expected answers to the same questions, got {len(first)} and {len(second)}")
    before = _resampled(first, aggregate, resamples, seed)
    after = _resampled(second, aggregate, resamples, seed)
    return _interval(float(aggregate(second)) - float(aggregate(first)), after - before, confidence)


def _check(statistics: np.ndarray) -> None:
    if not len(statistics):
        raise ValueError("expected the statistics of predictions, got none")


def _resampled(statistics: np.ndarray, aggregate: Aggregate, resamples: int, seed: int) -> np.ndarray:
    """Return the value of the metric on each resample. The draws depend on the seed and on N alone."""
    values = []
    for indices in _draws(len(statistics), resamples, seed):
        if aggregate is mean and statistics.ndim == 1:
            values.append(statistics[indices].mean(axis=1))
        else:
            values.append(np.array([aggregate(statistics[row]) for row in indices], dtype=np.float64))
    return np.concatenate(values)


def _draws(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield indices (R resamples, N) of the questions of each resample, in parts that fit into memory."""
    generator, left = np.random.default_rng(seed), resamples
    while left:
        rows = min(left, max(1, MAX_INDICES // count))
        yield generator.integers(count, size=(rows, count))
        left -= rows


def _interval(value: float, resampled: np.ndarray, confidence: float) -> Interval:
    defined = resampled[~np.isnan(resampled)]
    if not len(defined):
        return Interval(value, np.nan, np.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
