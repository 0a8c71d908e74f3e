"""Bootstrap intervals against closed forms, and against the enumeration of all resamples."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from flamingo_ft.evaluation.bootstrap import Interval, bootstrap_difference, bootstrap_interval
from flamingo_ft.evaluation.metrics import mean
from flamingo_ft.evaluation.metrics.classification import f1, roc_auc

Z = 1.959964  # the normal distribution's quantile of 0.975


@pytest.mark.parametrize(
    "scores",
    [np.repeat([0.0, 1.0], [280, 120]), np.random.default_rng(1).normal(3.0, 2.0, size=300)],
    ids=["0 or 1", "normal"],
)
def test_the_interval_of_a_mean_is_that_of_normal_theory(scores):
    error = scores.std() / math.sqrt(len(scores))
    interval = bootstrap_interval(scores, resamples=10_000)
    assert interval.value == scores.mean()
    assert interval.low == pytest.approx(scores.mean() - Z * error, abs=0.12 * error)
    assert interval.high == pytest.approx(scores.mean() + Z * error, abs=0.12 * error)


def test_the_interval_of_a_paired_difference_is_that_of_normal_theory():
    generator = np.random.default_rng(2)
    hardness = generator.normal(0.0, 5.0, size=300)
    first, second = hardness + generator.normal(size=300), hardness + 0.5 + generator.normal(size=300)
    differences = second - first
    error = differences.std() / math.sqrt(300)
    interval = bootstrap_difference(first, second, resamples=10_000)
    assert interval.value == pytest.approx(differences.mean())
    assert interval.low == pytest.approx(differences.mean() - Z * error, abs=0.12 * error)
    assert interval.high == pytest.approx(differences.mean() + Z * error, abs=0.12 * error)
    unpaired = bootstrap_interval(second).high - bootstrap_interval(second).low
    assert unpaired > 3 * (interval.high - interval.low)


def quantiles(values):
    """The quantiles 0.025 and 0.975 of equally likely values."""
    return np.quantile(values, [0.025, 0.975], method="inverted_cdf")


ROWS = {
    "mean": (np.array([0.0, 0.31, 0.7, 1.0]), mean),
    "f1": (np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]), f1),
    "roc auc": (np.array([[0.9, 1.0], [0.4, 0.0], [0.2, 1.0], [0.1, 0.0]]), roc_auc),
}


@pytest.mark.parametrize(("rows", "aggregate"), ROWS.values(), ids=ROWS)
def test_the_interval_is_that_of_all_resamples(rows, aggregate):
    everything = np.array([aggregate(rows[[*draw]]) for draw in product(range(4), repeat=4)])
    low, high = quantiles(everything[~np.isnan(everything)])
    interval = bootstrap_interval(rows, aggregate, resamples=4_000)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02)


def test_a_mean_in_one_step_is_that_of_the_loop():
    scores = np.random.default_rng(3).random(50)
    assert bootstrap_interval(scores) == bootstrap_interval(scores, lambda rows: float(np.mean(rows)))


def test_the_same_seed_draws_the_same_and_another_does_not():
    scores = np.random.default_rng(4).random(30)
    assert bootstrap_interval(scores) == bootstrap_interval(scores)
    assert bootstrap_interval(scores) != bootstrap_interval(scores, seed=1)


def test_draws_in_parts_are_those_at_once(monkeypatch):
    scores = np.random.default_rng(5).random(40)
    whole = bootstrap_interval(scores)
    monkeypatch.setattr("flamingo_ft.evaluation.bootstrap.MAX_INDICES", 40 * 7)
    assert bootstrap_interval(scores) == whole


def test_a_constant_difference_has_no_spread():
    first = np.random.default_rng(6).random(40)
    assert bootstrap_difference(first, first) == Interval(0.0, 0.0, 0.0)
    shifted = bootstrap_difference(first, first + 0.25)
    assert (shifted.low, shifted.high) == pytest.approx((0.25, 0.25))


def test_different_questions_and_none_at_all_are_refused():
    with pytest.raises(ValueError, match="answers to the same questions, got 2 and 3"):
        bootstrap_difference(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="got none"):
        bootstrap_interval(np.zeros(0))
