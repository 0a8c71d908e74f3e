"""A few numbers of every usable row, which is all that is kept of it: some 60 bytes, and 12 for each image."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from .rows import Seen

BINS = 40


class Numbers:
    """Columns over the rows that train or are held out, in order; ``picture`` and ``of`` (its row) over their media."""

    def __init__(self) -> None:
        self._columns = {
            "part": array("i"),
            "file": array("i"),
            "row": array("q"),
            "turns": array("i"),
            "media": array("i"),
            "text_tokens": array("q"),
            "label_tokens": array("q"),
            "content": array("Q"),
            "picture": array("Q"),
            "of": array("i"),
        }

    def add(self, seen: Seen) -> None:
        columns = self._columns
        number = len(columns["part"])
        for name in ("part", "file", "row", "turns", "text_tokens", "label_tokens", "content"):
            columns[name].append(getattr(seen, name))
        columns["media"].append(len(seen.pictures))
        columns["picture"].extend(seen.pictures)
        columns["of"].extend([number] * len(seen.pictures))

    def column(self, name: str) -> np.ndarray:
        column = self._columns[name]
        return np.frombuffer(column, dtype=column.typecode) if column else np.empty(0, column.typecode)


@dataclass(frozen=True)
class Distribution:
    """Of numbers over samples. counts[i]: how many lie from edges[i] to below edges[i + 1]."""

    least: float
    median: float
    mean: float
    most: float
    edges: list[float]
    counts: list[int]

    @classmethod
    def of(cls, values: np.ndarray, whole: bool = True, most: float | None = None) -> Distribution:
        """In bins from 0 to ``most``, or the largest. whole: of whole numbers, which bins group evenly."""
        if not len(values):
            return cls(0, 0, 0, 0, [0, 1], [0])
        high = values.max() if most is None else most
        edges = _whole_edges(int(high)) if whole else np.linspace(0, high, BINS // 2 + 1)
        counts, _ = np.histogram(values, edges)
        numbers = (values.min(), np.median(values), values.mean(), values.max())
        return cls(*(float(number) for number in numbers), edges.tolist(), counts.tolist())


def _whole_edges(high: int) -> np.ndarray:
    """Edges between whole numbers from 0 on, the same count of them in every bin, at most `BINS` bins."""
    width = -(-(high + 1) // BINS)
    return np.arange(0, high + width + 1, width) - 0.5
