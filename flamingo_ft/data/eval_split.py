"""Keep evaluation images out of training: split off a share of the rows, and find images on both sides."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flamingo_ft.errors import UserError
from flamingo_ft.model.download import is_url

from .media import image_files, read_bytes
from .sample import Image, Sample
from .sources import Source

RowId = tuple[int, int]  # a source and a row of it
MISSING = -1  # size of a file that does not exist, or is not on this machine


@dataclass(frozen=True)
class Overlap:
    """Evaluation samples that share an image with training samples.

    count: number of such samples. eval: location of the first. train: the training sample sharing its image.
    """

    count: int
    eval: str
    train: str


def split_eval(sources: Sequence[Source], fraction: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the numbers of the rows to train on and to evaluate on, in order, for each indexed source.

    About ``fraction`` of a source's rows are held out, at least one. Rows that share an image, in any source,
    stay together; files with identical content count as the same image. Which rows are held out depends on
    the seed and the content of the rows, not on their order or folder.
    Rows that cannot be read stay in training, which reports them. Raises UserError if all rows of a source
    are connected by their images.
    """
    sizes = np.array([len(source) for source in sources])
    groups = _groups(sources, seed)
    counts = [np.bincount([source for source, _ in rows], minlength=len(sources)) for rows in groups]
    chosen, unsplittable = _choose(counts, sizes, fraction)
    if unsplittable is not None:
        raise UserError(
            f"data.eval_fraction: {sources[unsplittable].name} has no rows that could be held out without "
            "their images being trained on; name a held-out file in data.eval"
        )
    held_out: list[list[int]] = [[] for _ in sources]
    for group in chosen:
        for source, row in groups[group]:
            held_out[source].append(row)
    return [_split(len(source), rows) for source, rows in zip(sources, held_out, strict=True)]


def find_overlap(train: Iterable[Sample], evaluated: Iterable[Sample]) -> Overlap | None:
    """Return the evaluation samples that share an image file with a training sample; None if there are none.

    Files are compared by digest, and only those of equal size are read; URLs are not fetched. `flamingo-ft
    check` compares decoded pixels instead, and so also finds an image that was saved again.
    """
    by_size: dict[int, list[tuple[Image, str]]] = defaultdict(list)
    for sample in evaluated:
        for image in image_files(sample.images):
            by_size[_size(image)].append((image, sample.where))
    by_size.pop(MISSING, None)
    eval_digests: dict[int, dict[bytes, list[str]]] = {}  # by size
    shared: dict[str, str] = {}  # evaluation sample -> first training sample
    for sample in train:
        for image in image_files(sample.images):
            size = _size(image)
            if size not in by_size:
                continue
            if size not in eval_digests:
                eval_digests[size] = _by_digest(by_size[size])
            digest = _content_digest(image)
            for where in eval_digests[size].get(digest, ()) if digest is not None else ():
                shared.setdefault(where, sample.where)
    return Overlap(len(shared), *next(iter(shared.items()))) if shared else None


def _choose(counts: Sequence[np.ndarray], sizes: np.ndarray, fraction: float) -> tuple[list[int], int | None]:
    """Return the groups to hold out, the first that fit, and a source that cannot be split, if any.

    counts: rows (S,) of each source in each group. A group with more rows than the fraction asks for is
    chosen only if a source has no other.
    """
    target = np.minimum(np.maximum(1, np.round(fraction * sizes)), sizes - 1)
    held = np.zeros_like(sizes)
    chosen: list[int] = []
    for group, count in enumerate(counts):
        if (held + count <= target).all():
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


def _split(size: int, held_out: list[int]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.array(sorted(held_out), dtype=np.int64)
    return np.setdiff1d(np.arange(size), rows), rows


def _groups(sources: Sequence[Source], seed: int) -> list[list[RowId]]:
    """Return the rows that are connected by images they share, in an order that follows from the seed."""
    sets, rows, files = _DisjointSets(), {}, _FilesBySize()
    for number, source in enumerate(sources):
        for row in range(len(source)):
            try:
                sample = source.sample(row, source.raw(row))
            except UserError:
                continue
            keys = _image_keys(sample)
            sets.join(keys)
            files.add(image_files(sample.images))
            rows[number, row] = keys[0], _rank(sample, seed)
    for paths in files.equal():
        sets.join([_digest(path) for path in paths])
    groups: dict[bytes, list[RowId]] = defaultdict(list)
    ranks: dict[bytes, bytes] = {}
    for row_id, (key, rank) in rows.items():
        root = sets.root(key)
        groups[root].append(row_id)
        ranks[root] = min(rank, ranks.get(root, rank))
    return [groups[root] for root in sorted(groups, key=ranks.__getitem__)]


def _image_keys(sample: Sample) -> list[bytes]:
    """Return digests of a sample's images (of paths, or contents of those in the row), else of its text."""
    return [_digest(image) for image in image_files(sample.images)] or [_digest(str(sample.messages))]


def _rank(sample: Sample, seed: int) -> bytes:
    """Return a random sort key of a sample; by words and names of images only, since folders may be moved."""
    names = [_digest(os.path.basename(image)) for image in image_files(sample.images)]
    return _digest(f"{seed} {names} {sample.messages}")


def _digest(content: str | bytes) -> bytes:
    content = content if isinstance(content, bytes) else content.encode()
    return hashlib.blake2b(content, digest_size=16).digest()


class _FilesBySize:
    """Image files grouped by size, so that only files of equal size are read to find identical ones.

    Images embedded in rows are ignored.
    """

    def __init__(self) -> None:
        self._files: dict[int, set[str]] = defaultdict(set)

    def add(self, images: Iterable[Image]) -> None:
        for image in images:
            if isinstance(image, str):
                self._files[_size(image)].add(image)

    def equal(self) -> Iterator[list[str]]:
        """Yield each set of two or more files with the same content."""
        self._files.pop(MISSING, None)
        for files in self._files.values():
            by_content: dict[bytes | None, list[str]] = defaultdict(list)
            for file in files if len(files) > 1 else ():
                by_content[_content_digest(file)].append(file)
            by_content.pop(None, None)
            yield from (copies for copies in by_content.values() if len(copies) > 1)


class _DisjointSets:
    """Sets of keys that are merged (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[bytes, bytes] = {}

    def root(self, key: bytes) -> bytes:
        """Return the key that represents the set of ``key``."""
        path = []
        while (parent := self._parent.setdefault(key, key)) != key:
            path.append(key)
            key = parent
        self._parent.update(dict.fromkeys(path, key))
        return key

    def join(self, keys: Iterable[bytes]) -> None:
        """Merge the sets of all ``keys``; the least of their roots becomes the root, whatever the order."""
        roots = sorted({self.root(key) for key in keys})
        self._parent.update(dict.fromkeys(roots, roots[0]))


def _size(image: Image) -> int:
    if isinstance(image, bytes):
        return len(image)
    if is_url(image):
        return MISSING
    try:
        return os.stat(image).st_size
    except OSError:
        return MISSING


def _by_digest(images: Iterable[tuple[Image, str]]) -> dict[bytes, list[str]]:
    samples: dict[bytes, list[str]] = defaultdict(list)
    for image, where in images:
        digest = _content_digest(image)
        if digest is not None:
            samples[digest].append(where)
    return samples


def _content_digest(image: Image) -> bytes | None:
    """Return the digest of a file's content; None if it cannot be read, which its user reports."""
    try:
        return _digest(read_bytes(image))
    except UserError:
        return None
