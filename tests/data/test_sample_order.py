"""Which rows are used, how often and in what order."""

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


def order_of(sources, seed: int = 0, buffer: int = 4) -> SampleOrder:
    return SampleOrder(
        [WeightedSource(Numbers(count, indexed), weight) for count, weight, indexed in sources], seed, buffer
    )


def taken(order: SampleOrder, count: int, start: int = 0) -> list[SampleIndex]:
    return list(islice(order.indices(start), count))


@given(mixtures, st.integers(0, 60), st.integers(0, 3))
def test_an_order_can_be_entered_at_any_position(sources, start, seed):
    order = order_of(sources, seed)
    assert taken(order, start + 30)[start:] == taken(order, 30, start)


@given(mixtures)
def test_samples_are_numbered_and_the_order_follows_from_the_seed(sources):
    order = order_of(sources, seed=5)
    indices = taken(order, 50)
    assert [index.number for index in indices] == list(range(50))
    assert indices == taken(order_of(sources, seed=5), 50)


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1.0, 1.5, 2.0, 0.5])), min_size=1, max_size=3))
def test_rows_are_used_in_proportion_to_the_weight_of_their_source(sources):
    order = order_of([(count, weight, True) for count, weight in sources])
    epochs = 4
    used = Counter((index.source, index.row) for index in taken(order, order._samples_before(epochs)))
    for source, (count, weight) in enumerate(sources):
        times = [used[source, row] for row in range(count)]
        assert max(times) - min(times) <= 1
        assert sum(times) == math.ceil(weight * count * epochs)


def test_an_epoch_has_every_row_once_and_the_next_epoch_another_order():
    order = order_of([(20, 1.0, True), (10, 1.0, True)])
    first, second = taken(order, 30), taken(order, 30, 30)
    pairs = sorted((index.source, index.row) for index in first)
    assert pairs == sorted((index.source, index.row) for index in second)
    assert pairs == [(0, row) for row in range(20)] + [(1, row) for row in range(10)]
    assert [(index.source, index.row) for index in first] != [(index.source, index.row) for index in second]


def test_only_the_selected_rows_are_used():
    order = SampleOrder([WeightedSource(Numbers(10), rows=np.array([1, 4, 7]))], seed=0)
    assert {index.row for index in taken(order, 30)} == {1, 4, 7}


def test_a_stream_is_shuffled_within_its_buffer_and_a_pass_has_every_row():
    order = order_of([(100, 1.0, False)], buffer=10)
    rows = [index.row for index in taken(order, 100)]
    assert sorted(rows) == list(range(100)) and rows != sorted(rows)
    assert all(row <= position + 10 for position, row in enumerate(rows))
    assert [index.raw for index in taken(order, 100)] == rows


def test_streams_are_drawn_by_weight():
    indices = taken(order_of([(50, 3.0, False), (50, 1.0, False)]), 4000)
    assert 0.72 < sum(index.source == 0 for index in indices) / 4000 < 0.78


@pytest.mark.parametrize("indexed", [True, False])
def test_a_source_without_rows_is_refused(indexed):
    with pytest.raises(UserError, match="numbers: no rows; provide at least one sample"):
        taken(order_of([(0, 1.0, indexed)]), 1)


def test_grouping_by_length_keeps_all_samples_and_puts_similar_lengths_together():
    order = order_of([(97, 1.0, True)])
    plain = taken(order, 80)
    grouped = list(group_by_length(iter(plain), lambda index: index.row, 4, 40, seed=0))
    assert sorted(index.number for index in grouped[:40]) == list(range(40))
    assert sorted(index.number for index in grouped[40:]) == list(range(40, 80))

    def spread(indices):
        return np.mean([np.ptp([index.row for index in indices[i : i + 4]]) for i in range(0, 80, 4)])

    assert spread(grouped) < spread(plain) / 4
    rows = [index.row for index in grouped[:40]]
    assert rows != sorted(rows), "batches are not sorted by size"
