"""Holding out a share of the rows, those that share an image together, so that no held-out image is trained on."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from flamingo_ft.errors import UserError

from .sample import Image, Sample, Video
from .sources import Source

Place = tuple[int, int]  # a source and a row of it


def hold_out(sources: Sequence[Source], fraction: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each indexed source the numbers of the rows to train on, and of those held out, both in order.

    About ``fraction`` of a source's rows are held out, at least one; which follows from the seed and what the rows show
    and say, not from their order or their folder. An image is the same in all sources, by its path or, where it stands
    in the row, by its content. Rows that cannot be read stay in training, which tells of them. Raises UserError where
    all rows of a source hang together by their images.
    """
    sizes = np.array([len(source) for source in sources])
    groups = _groups(sources, seed)
    counts = [np.bincount([source for source, _ in places], minlength=len(sources)) for places in groups]
    chosen, lacking = _choose(counts, sizes, fraction)
    if lacking is not None:
        raise UserError(
            f"data.eval_fraction: {sources[lacking].name} has no rows that could be held out without their images "
            "being trained on; name a held-out file in data.eval"
        )
    held = [place for group in chosen for place in groups[group]]
    return [
        _split(len(source), [row for of, row in held if of == number])
        for number, source in enumerate(sources)
    ]


def _choose(counts: Sequence[np.ndarray], sizes: np.ndarray, fraction: float) -> tuple[list[int], int | None]:
    """Which groups are held out, the first that fit, by how many rows (S,) of each source they have; and a source of
    which nothing can be. A group of more than what is wanted only where there is no other."""
    wanted = np.minimum(np.maximum(1, np.round(fraction * sizes)), sizes - 1)
    held, chosen = np.zeros_like(sizes), []
    for group, count in enumerate(counts):
        if (held + count <= wanted).all():
            chosen.append(group)
            held += count
    for source in range(len(sizes)):
        if held[source]:
            continue
        fitting = [g for g, count in enumerate(counts) if count[source] and (held + count < sizes).all()]
        if not fitting:
            return chosen, source
        chosen.append(min(fitting, key=lambda group: counts[group].sum()))
        held += counts[chosen[-1]]
    return chosen, None


def _split(size: int, held: list[int]) -> tuple[np.ndarray, np.ndarray]:
    held_out = np.array(sorted(held), dtype=np.int64)
    return np.setdiff1d(np.arange(size), held_out), held_out


def _groups(sources: Sequence[Source], seed: int) -> list[list[Place]]:
    """Rows that belong together by what they share, in an order that follows from the seed."""
    union, shown = _Union(), {}
    for number, source in enumerate(sources):
        for row in range(len(source)):
            try:
                sample = source.sample(row, source.raw(row))
            except UserError:
                continue
            keys = _shown(sample)
            union.join(keys)
            shown[number, row] = keys[0], _rank(sample, seed)
    groups, ranks = defaultdict(list), {}
    for place, (key, rank) in shown.items():
        root = union.root(key)
        groups[root].append(place)
        ranks[root] = min(rank, ranks.get(root, rank))
    return [groups[root] for root in sorted(groups, key=ranks.__getitem__)]


def _shown(sample: Sample) -> list[bytes]:
    """The images of a sample, by their digests; of one without, its text."""
    return [_digest(image) for image in _images(sample)] or [_digest(str(sample.messages))]


def _images(sample: Sample) -> list[Image]:
    media = [(*m.frames, m.file) if isinstance(m, Video) else (m,) for m in sample.images]
    return [image for frames in media for image in frames if image is not None]


def _rank(sample: Sample, seed: int) -> bytes:
    """By words and the names of images: folders may be moved."""
    names = [_digest(os.path.basename(image)) for image in _images(sample)]
    return _digest(f"{seed} {names} {sample.messages}")


def _digest(content: str | bytes) -> bytes:
    return hashlib.blake2b(
        content if isinstance(content, bytes) else content.encode(), digest_size=16
    ).digest()


class _Union:
    """Sets of keys that grow together (union-find)."""

    def __init__(self) -> None:
        self._above: dict[bytes, bytes] = {}

    def root(self, key: bytes) -> bytes:
        """The key that stands for the set of ``key``."""
        path = []
        while (above := self._above.setdefault(key, key)) != key:
            path.append(key)
            key = above
        self._above.update(dict.fromkeys(path, key))
        return key

    def join(self, keys: Iterable[bytes]) -> None:
        """Make one set of those of all ``keys``; the least of their roots stands for it, whatever the order."""
        roots = sorted({self.root(key) for key in keys})
        self._above.update(dict.fromkeys(roots, roots[0]))
