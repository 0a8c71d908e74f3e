"""What a run's training samples are like, for the record in its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from flamingo_ft.adapters.trained_on import joined_record, record_of_samples
from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData, Sample
from flamingo_ft.data.sample_order import WeightedSource

ROWS = 1000  # of each source, at random: what 1 % of the rows have is missed with a probability of 4e-5
STREAMED_ROWS = 100  # they may have to be downloaded


def trained_on(recipe: Recipe, data: OpenedData, start: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the record of the run's training samples, and of what it started from.

    start: the record of that, None if that is not known.
    """
    own = record_of_samples(_samples(data))
    return own if recipe.model.init_from is None else joined_record(start, own)


def _samples(data: OpenedData) -> Iterator[Sample]:
    for weighted in data.train:
        if weighted.source.indexed:
            yield from data.samples([_some_rows(weighted)])
        else:
            yield from islice(data.samples([weighted]), STREAMED_ROWS)


def _some_rows(weighted: WeightedSource) -> WeightedSource:
    rows = np.arange(weighted.size) if weighted.rows is None else weighted.rows
    if len(rows) <= ROWS:
        return weighted
    return replace(weighted, rows=np.sort(np.random.default_rng(0).choice(rows, ROWS, replace=False)))
