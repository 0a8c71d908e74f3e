"""In which order rows are shown: an endless sequence that follows from the sources, their weights and a seed alone.

So it is the same whatever the number of workers, and can be entered anywhere.
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

AT_ONCE = 4096  # numbers


@dataclass(frozen=True)
class SampleIndex:
    """One row to be shown: the ``number``-th of a run, row ``row`` of source ``source``.

    raw: the row itself where its source is streamed, else None.
    """

    number: int
    source: int
    row: int
    raw: Any = None


@dataclass(frozen=True)
class WeightedSource:
    """A source in a mixture.

    weight: how often its rows are shown, relative to those of other sources (for streams: its share of the draws).
    rows: the rows that may be shown; None for all.
    """

    source: Source
    weight: float = 1.0
    rows: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Rows that may be shown, of an indexed source."""
        return len(self.source) if self.rows is None else len(self.rows)

    def draws_before(self, epoch: int) -> int:
        """Draws of this source, indexed, in the first ``epoch`` epochs."""
        return math.ceil(self.weight * self.size * epoch)


class SampleOrder:
    """The draws of a mixture, in order, without an end.

    Where all sources are indexed, an epoch shows a row of a source of weight w w times on average, never two of its
    rows more than one time apart. Otherwise sources are drawn by weight, and a streamed one is shuffled within a buffer.
    """

    def __init__(self, mixture: Sequence[WeightedSource], seed: int, shuffle_buffer: int = 1000):
        self.mixture = mixture
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.indexed = all(mixed.source.indexed for mixed in mixture)
        _refuse_empty(mixture)

    @property
    def epoch_length(self) -> int | None:
        """Draws in an epoch; None where a source is streamed."""
        return self._shown_before(1) if self.indexed else None

    def draws(self, start: int = 0) -> Iterator[SampleIndex]:
        """The draws from number ``start`` on."""
        if not self.indexed:
            return itertools.islice(self._drawn_by_weight(), start, None)
        return self._drawn_by_epoch(start)

    def _drawn_by_epoch(self, start: int) -> Iterator[SampleIndex]:
        number = start
        for epoch in itertools.count(
            start // self.epoch_length
        ):  # epochs are as long as the first, or a little shorter
            begin, end = self._shown_before(epoch), self._shown_before(epoch + 1)
            if end <= number:
                continue
            for source, row in _few_at_a_time(self._epoch(epoch)[number - begin :]):
                yield SampleIndex(number, source, row)
                number += 1

    def _epoch(self, epoch: int) -> np.ndarray:
        """The draws of one epoch, (N, 2): source and row."""
        parts = []
        for index, mixed in enumerate(self.mixture):
            rows = self._rows(index, mixed.draws_before(epoch), mixed.draws_before(epoch + 1))
            parts.append(np.stack([np.full_like(rows, index), rows], axis=1))
        draws = np.concatenate(parts)
        return draws[np.random.default_rng([self.seed, epoch]).permutation(len(draws))]

    def _rows(self, index: int, begin: int, end: int) -> np.ndarray:
        """Places ``begin`` to ``end`` of a source's rows, shuffled pass after pass."""
        size = self.mixture[index].size
        first, last = begin // size, -(-end // size)
        passes = [self._pass(index, number) for number in range(first, last)]
        rows = np.concatenate(passes or [np.empty(0, dtype=np.int64)])
        return rows[begin - first * size : end - first * size]

    def _pass(self, index: int, number: int) -> np.ndarray:
        mixed = self.mixture[index]
        places = np.random.default_rng([self.seed, index, number]).permutation(mixed.size)
        return places if mixed.rows is None else mixed.rows[places]

    def _shown_before(self, epoch: int) -> int:
        """Draws in the first ``epoch`` epochs."""
        return sum(mixed.draws_before(epoch) for mixed in self.mixture)

    def _drawn_by_weight(self) -> Iterator[SampleIndex]:
        rng = np.random.default_rng(self.seed)
        shares = np.array([mixed.weight for mixed in self.mixture])
        streams = [self._endless(index) for index in range(len(self.mixture))]
        for number in itertools.count():
            source = int(rng.choice(len(streams), p=shares / shares.sum()))
            row, raw = next(streams[source])
            yield SampleIndex(number, source, row, raw)

    def _endless(self, index: int) -> Iterator[tuple[int, Any]]:
        """Row number and raw row of one source, pass after pass; raw is None where the source is indexed."""
        mixed = self.mixture[index]
        for number in itertools.count():
            if mixed.source.indexed:
                yield from ((row, None) for row in _few_at_a_time(self._pass(index, number)))
                continue
            rng = np.random.default_rng([self.seed, index, number])
            empty = True
            for pair in _shuffled(enumerate(mixed.source.stream()), self.shuffle_buffer, rng):
                empty = False
                yield pair
            if empty:
                raise UserError(f"{mixed.source.name}: got no rows; expected at least one sample")


def _few_at_a_time(numbers: np.ndarray) -> Iterator[Any]:
    """What ``numbers.tolist()`` has, without a list that takes ten times the array's memory."""
    for begin in range(0, len(numbers), AT_ONCE):
        yield from numbers[begin : begin + AT_ONCE].tolist()


def group_by_length(
    draws: Iterator[SampleIndex], size_of: Callable[[SampleIndex], int], batch: int, window: int, seed: int
) -> Iterator[SampleIndex]:
    """The draws with those of like size next to each other, ``batch`` at a time.

    Within each ``window`` draws (a multiple of ``batch``) they are sorted by size, cut into batches, and the batches
    shuffled. The first draw has to be the first of a window.
    """
    while block := list(itertools.islice(draws, window)):
        block.sort(key=lambda draw: (size_of(draw), draw.number))
        batches = [block[i : i + batch] for i in range(0, len(block), batch)]
        np.random.default_rng([seed, min(draw.number for draw in block)]).shuffle(batches)
        yield from itertools.chain.from_iterable(batches)


def _shuffled(items: Iterator[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """The items, each drawn from among the next ``size``."""
    buffer = list(itertools.islice(items, size))
    for item in items:
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = item
    rng.shuffle(buffer)
    yield from buffer


def _refuse_empty(mixture: Sequence[WeightedSource]) -> None:
    for mixed in mixture:
        if mixed.source.indexed and not mixed.size:
            raise UserError(f"{mixed.source.name}: got no rows; expected at least one sample")
