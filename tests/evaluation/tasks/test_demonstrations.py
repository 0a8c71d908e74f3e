"""Demonstrations: the draws of OpenFlamingo's evaluation, the nearest images, shuffled answers."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from flamingo_ft.errors import UserError
from flamingo_ft.evaluation.tasks import (
    Example,
    count_demonstrations,
    demonstrations,
    draw_demonstrations,
    draw_eval_rows,
    nearest_demonstrations,
    with_shuffled_answers,
)


def peer_draws(rows, train_rows, demonstrations, seed, count, pool_size):
    """What OpenFlamingo's evaluation draws in one process: row -> training rows shown before it, in order."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        np.random.seed(seed)
        subset = np.random.choice(rows, count, replace=False)
        query_set = [int(i) for i in np.random.choice(train_rows, pool_size, replace=False)]
        np.random.seed(seed)
        random.seed(seed)
        order = DistributedSampler(range(count), num_replicas=1, rank=0)
        return [(int(subset[i]), random.sample(query_set, demonstrations)) for i in order]
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("rows, count, train_rows", [(30, 30, 5000), (100, 17, 2048), (5, 5, 2049)])
def test_random_demonstrations_are_those_of_open_flamingo(rows, count, train_rows, seed):
    expected = peer_draws(rows, train_rows, 4, seed, count, pool_size=2048)
    drawn = draw_demonstrations(rows, train_rows, 4, seed, count)
    together = zip(draw_eval_rows(rows, seed, count), drawn, strict=True)
    assert [(int(row), shown.tolist()) for row, shown in together] == expected


def test_all_rows_are_evaluated_once_and_none_is_shown_twice_in_a_prompt():
    assert sorted(draw_eval_rows(50, seed=1)) == [*range(50)]
    assert sorted(draw_eval_rows(50, seed=1, count=80)) == [*range(50)]
    drawn = draw_demonstrations(50, 6, 5, seed=1)
    assert drawn.shape == (50, 5) and {*drawn.flat} == {*range(6)}
    assert all(len({*shown}) == 5 for shown in drawn)


def test_another_seed_draws_others():
    draws = [draw_demonstrations(20, 1000, 8, seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_zero_shots_are_two_demonstrations():
    assert [count_demonstrations(shots) for shots in (0, 1, 2, 32)] == [2, 1, 2, 32]
    with pytest.raises(UserError, match="^shots: must be 0 or more, got -1; "):
        count_demonstrations(-1)


def test_too_few_training_rows_are_refused():
    message = "^shots: must be 1 to 3 training rows, got 4; "
    with pytest.raises(UserError, match=message):
        draw_demonstrations(10, 3, 4, seed=0)
    with pytest.raises(UserError, match=message):
        nearest_demonstrations(np.ones((1, 2)), np.ones((3, 2)), 4)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_the_nearest_are_those_of_a_full_sort_with_the_most_similar_last(count, seed):
    rng = np.random.default_rng(seed)
    queries, candidates = rng.integers(-2, 3, (5, 3)) + 0.5, rng.integers(-2, 3, (40, 3)) + 0.5
    found = nearest_demonstrations(queries, candidates, count)
    for query, indices in zip(queries, found, strict=True):
        cosines = [
            candidate @ query / (np.linalg.norm(candidate) * np.linalg.norm(query))
            for candidate in candidates
        ]
        best_first = sorted(cosines, reverse=True)[:count]
        np.testing.assert_allclose([cosines[i] for i in reversed(indices)], best_first, atol=1e-6)
        assert len({*indices}) == count


def test_lengths_of_features_do_not_matter_and_the_first_of_equals_is_the_nearest():
    candidates = np.array([[0, 1.0], [5, 0], [1, 0], [1, 1], [100, 1]])
    assert nearest_demonstrations(np.array([[2.0, 0]]), candidates, 4).tolist() == [[3, 4, 2, 1]]


def test_many_queries_are_answered_in_parts_that_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(7, 4)), rng.normal(size=(9, 4))
    whole = nearest_demonstrations(queries, candidates, 3)
    monkeypatch.setattr(demonstrations, "SIMILARITIES_AT_ONCE", 20)
    assert np.array_equal(nearest_demonstrations(queries, candidates, 3), whole)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_features_without_a_direction_are_refused(value):
    candidates = np.ones((3, 2))
    candidates[1] = value
    with pytest.raises(UserError, match=r"^candidates: the features of row 1 have length (0|nan|inf); "):
        nearest_demonstrations(np.ones((1, 2)), candidates, 1)


def examples_with(answers):
    return [
        Example(f"row {i}", (f"{i}.png",), f"{i}?", (answer, "other")) for i, answer in enumerate(answers)
    ]


@given(st.lists(st.sampled_from("abcd"), max_size=7), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_shuffling_moves_as_many_answers_as_can_be_moved_and_nothing_else(answers, seed):
    before = examples_with(answers)
    after = with_shuffled_answers(before, seed)
    given = [example.references[0] for example in after]
    assert [(e.where, e.images, e.question) for e in after] == [
        (e.where, e.images, e.question) for e in before
    ]
    assert sorted(given) == sorted(answers)
    assert all(len(example.references) == 1 for example in after)
    moved = sum(map(str.__ne__, given, answers))
    largest = max(map(answers.count, answers), default=0)
    assert moved == min(len(answers), 2 * (len(answers) - largest))


def test_as_many_as_can_be_moved_is_what_trying_all_permutations_finds():
    for answers in ("ab", "aab", "aabb", "aaab", "abcc", "aaaa"):
        best = max(sum(map(str.__ne__, order, answers)) for order in itertools.permutations(answers))
        given = [one.references[0] for one in with_shuffled_answers(examples_with(answers), 0)]
        assert sum(map(str.__ne__, given, answers)) == best


def test_shuffled_answers_are_those_of_their_seed():
    before = examples_with("abcdefgh")
    orders = {tuple(e.references[0] for e in with_shuffled_answers(before, seed)) for seed in (0, 0, 1, "x")}
    assert len(orders) == 3
