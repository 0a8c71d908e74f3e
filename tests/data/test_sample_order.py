"""Which rows are shown, how often and in what order."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamingo_ft.data.sample_order import SampleIndex, SampleOrder, WeightedSource, group_by_length
from flamingo_ft.errors import UserError
from tests.data.fakes import Numbers

mixtures = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1.0, 1.3, 2.0]), st.booleans()),
    min_size=1,
    max_size=3,
)


def order_of(parts, seed: int = 0, buffer: int = 4) -> SampleOrder:
    return SampleOrder(
        [WeightedSource(Numbers(count, indexed), weight) for count, weight, indexed in parts], seed, buffer
    )


def taken(order: SampleOrder, count: int, start: int = 0) -> list[SampleIndex]:
    return list(islice(order.indices(start), count))


@given(mixtures, st.integers(0, 60), st.integers(0, 3))
def test_an_order_entered_anywhere_goes_on_as_it_would_have(parts, start, seed):
    order = order_of(parts, seed)
    assert taken(order, start + 30)[start:] == taken(order, 30, start)


@given(mixtures)
def test_draws_are_numbered_and_a_seed_gives_one_order(parts):
    order = order_of(parts, seed=5)
    draws = taken(order, 50)
    assert [draw.number for draw in draws] == list(range(50))
    assert draws == taken(order_of(parts, seed=5), 50)


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1.0, 1.5, 2.0, 0.5])), min_size=1, max_size=3))
def test_a_row_is_shown_as_often_as_its_weight_says(parts):
    order = order_of([(count, weight, True) for count, weight in parts])
    epochs = 4
    shown = Counter((draw.source, draw.row) for draw in taken(order, order._samples_before(epochs)))
    for source, (count, weight) in enumerate(parts):
        times = [shown[source, row] for row in range(count)]
        assert max(times) - min(times) <= 1
        assert sum(times) == math.ceil(weight * count * epochs)


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order():
    order = order_of([(20, 1.0, True), (10, 1.0, True)])
    first, second = taken(order, 30), taken(order, 30, 30)
    pairs = sorted((draw.source, draw.row) for draw in first)
    assert pairs == sorted((draw.source, draw.row) for draw in second)
    assert pairs == [(0, row) for row in range(20)] + [(1, row) for row in range(10)]
    assert [(d.source, d.row) for d in first] != [(d.source, d.row) for d in second]


def test_only_the_rows_that_may_be_shown_are():
    order = SampleOrder([WeightedSource(Numbers(10), rows=np.array([1, 4, 7]))], seed=0)
    assert {draw.row for draw in taken(order, 30)} == {1, 4, 7}


def test_a_stream_is_shuffled_within_its_buffer_and_shows_every_row_in_a_pass():
    order = order_of([(100, 1.0, False)], buffer=10)
    rows = [draw.row for draw in taken(order, 100)]
    assert sorted(rows) == list(range(100)) and rows != sorted(rows)
    assert all(row <= place + 10 for place, row in enumerate(rows))
    assert [draw.raw for draw in taken(order, 100)] == rows


def test_streams_are_drawn_by_weight():
    draws = taken(order_of([(50, 3.0, False), (50, 1.0, False)]), 4000)
    assert 0.72 < sum(draw.source == 0 for draw in draws) / 4000 < 0.78


@pytest.mark.parametrize("indexed", [True, False])
def test_a_source_without_rows_is_refused(indexed):
    with pytest.raises(UserError, match="numbers: no rows; provide at least one sample"):
        taken(order_of([(0, 1.0, indexed)]), 1)


def test_grouping_by_length_keeps_the_rows_and_makes_batches_alike():
    order = order_of([(97, 1.0, True)])
    plain = taken(order, 80)
    found = list(group_by_length(iter(plain), lambda draw: draw.row, 4, 40, seed=0))
    assert sorted(d.number for d in found[:40]) == list(range(40))
    assert sorted(d.number for d in found[40:]) == list(range(40, 80))

    def spread(draws):
        return np.mean([np.ptp([d.row for d in draws[i : i + 4]]) for i in range(0, 80, 4)])

    assert spread(found) < spread(plain) / 4
    assert [d.row for d in found[:40]] != sorted(d.row for d in found[:40]), "batches are not sorted by size"
