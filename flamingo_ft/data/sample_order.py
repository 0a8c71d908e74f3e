"""The order in which rows are used: an endless sequence that follows from sources, weights and a seed.

So it is the same for any number of workers, and can be entered at any position.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flamingo_ft.data.sources.source import Source
from flamingo_ft.errors import UserError

CHUNK = 4096  # row numbers


@dataclass(frozen=True)
class SampleIndex:
    """The ``number``-th sample of a run: row ``row`` of source ``source``.

    raw: the row itself if its source is streamed, else None.
    """

    number: int
    source: int
    row: int
    raw: Any = None


@dataclass(frozen=True)
class WeightedSource:
    """A source in a mixture.

    weight: how often its rows are used, relative to those of other sources (if any source is streamed: its
    share of the samples). rows: numbers of the rows that may be used; None for all.
    """

    source: Source
    weight: float = 1.0
    rows: np.ndarray | None = None

    @property
    def size(self) -> int:
        """How many rows of an indexed source may be used."""
        return len(self.source) if self.rows is None else len(self.rows)

    def samples_before(self, epoch: int) -> int:
        """Return how many samples of this indexed source the first ``epoch`` epochs have."""
        return math.ceil(self.weight * self.size * epoch)


class SampleOrder:
    """The samples of a mixture in order, without an end.

    If all sources are indexed, an epoch draws each row ``weight`` times on average; after any number of whole
    epochs, counts within a source differ by at most one. Otherwise sources are drawn at random by weight, and
    streamed ones are shuffled within a buffer of ``shuffle_buffer`` rows.
    """

    def __init__(self, mixture: Sequence[WeightedSource], seed: int, shuffle_buffer: int = 1000):
        self.mixture = mixture
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.indexed = all(weighted.source.indexed for weighted in mixture)
        for weighted in mixture:
            if weighted.source.indexed and not weighted.size:
                raise _no_rows(weighted.source)

    @property
    def epoch_length(self) -> int | None:
        """Samples in an epoch; None if a source is streamed."""
        return self._samples_before(1) if self.indexed else None

    def indices(self, start: int = 0) -> Iterator[SampleIndex]:
        """Yield the samples from number ``start`` on."""
        if not self.indexed:
            return itertools.islice(self._drawn_by_weight(), start, None)
        return self._by_epoch(start)

    def _by_epoch(self, start: int) -> Iterator[SampleIndex]:
        number = start
        # No epoch is longer than the first, so sample ``start`` is not in an earlier one.
        for epoch in itertools.count(start // self._samples_before(1)):
            begin, end = self._samples_before(epoch), self._samples_before(epoch + 1)
            if end <= number:
                continue
            for source, row in _in_chunks(self._epoch(epoch)[number - begin :]):
                yield SampleIndex(number, source, row)
                number += 1

    def _epoch(self, epoch: int) -> np.ndarray:
        """Return the samples of one epoch, (N, 2): source and row."""
        parts = []
        for index, weighted in enumerate(self.mixture):
            rows = self._rows(index, weighted.samples_before(epoch), weighted.samples_before(epoch + 1))
            parts.append(np.stack([np.full_like(rows, index), rows], axis=1))
        samples = np.concatenate(parts)
        return samples[np.random.default_rng([self.seed, epoch]).permutation(len(samples))]

    def _rows(self, index: int, begin: int, end: int) -> np.ndarray:
        """Return elements ``begin`` to ``end`` of a source's rows, shuffled pass after pass."""
        size = self.mixture[index].size
        first, last = begin // size, -(-end // size)
        passes = [self._pass(index, number) for number in range(first, last)]
        rows = np.concatenate(passes or [np.empty(0, dtype=np.int64)])
        return rows[begin - first * size : end - first * size]

    def _pass(self, index: int, number: int) -> np.ndarray:
        """Return all rows of a source, shuffled."""
        weighted = self.mixture[index]
        order = np.random.default_rng([self.seed, index, number]).permutation(weighted.size)
        return order if weighted.rows is None else weighted.rows[order]

    def _samples_before(self, epoch: int) -> int:
        return sum(weighted.samples_before(epoch) for weighted in self.mixture)

    def _drawn_by_weight(self) -> Iterator[SampleIndex]:
        rng = np.random.default_rng(self.seed)
        weights = np.array([weighted.weight for weighted in self.mixture])
        streams = [self._endless(index) for index in range(len(self.mixture))]
        for number in itertools.count():
            choice: Any = rng.choice(len(streams), p=weights / weights.sum())  # a numpy integer
            source = int(choice)
            row, raw = next(streams[source])
            yield SampleIndex(number, source, row, raw)

    def _endless(self, index: int) -> Iterator[tuple[int, Any]]:
        """Yield row number and raw row of one source, pass after pass; raw is None for an indexed source."""
        source = self.mixture[index].source
        for number in itertools.count():
            if source.indexed:
                yield from ((row, None) for row in _in_chunks(self._pass(index, number)))
                continue
            rng = np.random.default_rng([self.seed, index, number])
            is_empty = True
            for row in _shuffled(enumerate(source.stream()), self.shuffle_buffer, rng):
                is_empty = False
                yield row
            if is_empty:
                raise _no_rows(source)


def group_by_length(
    indices: Iterator[SampleIndex],
    length_of: Callable[[SampleIndex], int],
    batch: int,
    window: int,
    seed: int,
) -> Iterator[SampleIndex]:
    """Yield the samples with those of similar length next to each other, ``batch`` at a time.

    Within each ``window`` samples (a multiple of ``batch``) they are sorted by length, cut into batches, and
    the batches shuffled. The first sample must be the first of a window.
    """
    while block := list(itertools.islice(indices, window)):
        block.sort(key=lambda index: (length_of(index), index.number))
        batches = [block[i : i + batch] for i in range(0, len(block), batch)]
        np.random.default_rng([seed, min(index.number for index in block)]).shuffle(batches)
        yield from itertools.chain.from_iterable(batches)


def _in_chunks(numbers: np.ndarray) -> Iterator[Any]:
    """Yield what ``numbers.tolist()`` has, without a list that takes ten times the array's memory."""
    for begin in range(0, len(numbers), CHUNK):
        yield from numbers[begin : begin + CHUNK].tolist()


def _shuffled(items: Iterator[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Yield the items, each drawn from the next ``size``."""
    buffer = list(itertools.islice(items, size))
    for item in items:
        position = int(rng.integers(size))
        yield buffer[position]
        buffer[position] = item
    rng.shuffle(buffer)
    yield from buffer


def _no_rows(source: Source) -> UserError:
    return UserError(f"{source.name}: no rows; provide at least one sample")
