"""Holding out a share of a source's rows, those that share an image together, so that no held-out image is trained on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np

from flamingo_ft.errors import UserError

from .sample import Sample, Video
from .sources import Source


def hold_out(source: Source, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of an indexed source's rows to train on, and of those held out, both in order.

    About ``fraction`` of the rows are held out, at least one; which follows from the seed and what the rows show, not from
    their order. Rows that cannot be read stay in training, which tells of them. Raises UserError where all rows hang
    together by their images.
    """
    groups = _groups(source)
    wanted, held = max(1, round(fraction * len(source))), []
    for _, rows in sorted(groups.items(), key=lambda group: _rank(group[0], seed)):
        if len(held) >= wanted:
            break
        held += rows
    if not held or len(held) == len(source):
        raise UserError(
            f"data.eval_fraction: {source.name} has no rows that could be held out without their images being trained on; "
            "name a held-out file in data.eval"
        )
    held_out = np.array(sorted(held))
    return np.setdiff1d(np.arange(len(source)), held_out), held_out


def _groups(source: Source) -> dict[Hashable, list[int]]:
    """Row numbers that belong together, by what they share."""
    union = _Union()
    of_row = {}
    for row in range(len(source)):
        try:
            shown = _shown(source.sample(row, source.raw(row)))
        except UserError:
            continue
        of_row[row] = shown[0]
        union.join(shown)
    groups = defaultdict(list)
    for row, key in of_row.items():
        groups[union.root(key)].append(row)
    return groups


def _shown(sample: Sample) -> list[Hashable]:
    """The images of a sample; of one without, its text."""
    frames = [f for m in sample.images for f in ((*m.frames, m.file) if isinstance(m, Video) else (m,)) if f is not None]
    return frames or [str(sample.messages)]


def _rank(key: Hashable, seed: int) -> bytes:
    content = key if isinstance(key, bytes) else str(key).encode()
    return hashlib.blake2b(content, salt=seed.to_bytes(16, "little")).digest()


class _Union:
    """Sets of keys that grow together (union-find)."""

    def __init__(self) -> None:
        self._above: dict[Hashable, Hashable] = {}

    def root(self, key: Hashable) -> Hashable:
        """The key that stands for the set of ``key``."""
        path = []
        while (above := self._above.setdefault(key, key)) != key:
            path.append(key)
            key = above
        self._above.update(dict.fromkeys(path, key))
        return key

    def join(self, keys: Iterable[Hashable]) -> None:
        """Make one set of those of all ``keys``; the least of their roots stands for it, whatever the order."""
        roots = sorted({self.root(key) for key in keys}, key=str)
        self._above.update(dict.fromkeys(roots, roots[0]))
