"""Holding out a share of the rows, those that share an image together, so that no held-out image is trained on.

Held-out images that are trained on too, found by content before a run begins.

Files are compared byte by byte through their digests, and only files of equal size are read. `flamingo-ft check` compares
decoded pixels, and so finds a picture that was saved again too.

"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flamingo_ft.errors import UserError
from flamingo_ft.model.download import is_url

from .media import read_bytes
from .sample import Image, Medium, Sample, Video
from .sources import Source

Place = tuple[int, int]  # a source and a row of it


def split_eval(sources: Sequence[Source], fraction: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
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
    return [_digest(image) for image in _images(sample.images)] or [_digest(str(sample.messages))]


def _images(media: Iterable[Medium]) -> Iterator[Image]:
    """Yield each image file, and for a video its file or its frames."""
    for medium in media:
        if isinstance(medium, Video):
            yield from medium.frames if medium.file is None else (medium.file,)
        else:
            yield medium


def _rank(sample: Sample, seed: int) -> bytes:
    """By words and the names of images: folders may be moved."""
    names = [_digest(os.path.basename(image)) for image in _images(sample.images)]
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


MISSING = -1  # size of a file that is not there, or not on this machine


@dataclass(frozen=True)
class Overlap:
    """count: held-out samples with an image that is trained on. eval, train: where the first one is, and where the
    same image is trained on."""

    count: int
    eval: str
    train: str


def find_overlap(train: Iterable[Sample], held_out: Iterable[Sample]) -> Overlap | None:
    """Held-out samples that share an image with a training sample; None where there are none. URLs are not fetched."""
    by_size: dict[int, list[tuple[Image, str]]] = defaultdict(list)
    for sample in held_out:
        for image in _images(sample.images):
            by_size[_size(image)].append((image, sample.where))
    by_size.pop(MISSING, None)
    digests = {}
    shared: dict[str, str] = {}  # where of a held-out sample -> where of the first training sample
    for sample in train:
        for image in _images(sample.images):
            size = _size(image)
            if size not in by_size:
                continue
            if size not in digests:
                digests[size] = _by_digest(by_size[size])
            for where in digests[size].get(_content_digest(image), ()):
                shared.setdefault(where, sample.where)
    return Overlap(len(shared), *next(iter(shared.items()))) if shared else None


def _size(image: Image) -> int:
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, str) and is_url(image):
        return MISSING
    try:
        return os.stat(image).st_size
    except OSError:
        return MISSING


def _by_digest(images: Iterable[tuple[Image, str]]) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = defaultdict(list)
    for image, where in images:
        digest = _content_digest(image)
        if digest is not None:
            found[digest].append(where)
    return found


def _content_digest(image: Image) -> bytes | None:
    """None for a file that cannot be read, which is reported where it is used."""
    try:
        return hashlib.blake2b(read_bytes(image), digest_size=16).digest()
    except UserError:
        return None
