"""Held-out images that are trained on too, found by content before a run begins.

Files are compared byte by byte through their digests, and only files of equal size are read. `flamingo-ft check` compares
decoded pixels, and so finds a picture that was saved again too.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flamingo_ft.errors import UserError
from flamingo_ft.model.image_source import is_url

from .media import read_content
from .sample import Image, Medium, Sample, Video

MISSING = -1  # size of a file that is not there, or not on this machine


@dataclass(frozen=True)
class Overlap:
    """count: held-out samples with an image that is trained on. held_out, train: where the first one is, and where the
    same image is trained on."""

    count: int
    held_out: str
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
            for where in digests[size].get(_digest(image), ()):
                shared.setdefault(where, sample.where)
    return Overlap(len(shared), *next(iter(shared.items()))) if shared else None


def _images(media: Iterable[Medium]) -> Iterator[Image]:
    for medium in media:
        if isinstance(medium, Video):
            yield from medium.frames if medium.file is None else (medium.file,)
        else:
            yield medium


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
        digest = _digest(image)
        if digest is not None:
            found[digest].append(where)
    return found


def _digest(image: Image) -> bytes | None:
    """None for a file that cannot be read, which is reported where it is used."""
    try:
        return hashlib.blake2b(read_content(image), digest_size=16).digest()
    except UserError:
        return None
