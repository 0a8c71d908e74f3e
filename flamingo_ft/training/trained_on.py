"""What a run's training samples are like, for the record in its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from flamingo_ft.adapters.trained_on import joined_record, record_of_samples
from flamingo_ft.config import Recipe
from flamingo_ft.data import OpenedData, Sample
from flamingo_ft.data.opened_data import MAX_VALIDATED_ROWS

STREAMED_ROWS = 100  # they may have to be downloaded


def trained_on(recipe: Recipe, data: OpenedData, start: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the record of the run's training samples, and of what it started from.

    start: the record of that, None if that is not known.
    """
    own = record_of_samples(_samples(data))
    return own if recipe.model.init_from is None else joined_record(start, own)


def _samples(data: OpenedData) -> Iterator[Sample]:
    """Yield the first samples of each training source; all of a source with few enough rows."""
    for weighted in data.train:
        rows = MAX_VALIDATED_ROWS if weighted.source.indexed else STREAMED_ROWS
        yield from islice(data.samples([weighted]), rows)
