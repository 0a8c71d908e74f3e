"""Which files of a WebDataset tar make up one sample.

The standard: neighbours whose names agree up to the first dot are one sample, so `7.png`, `7.txt` and
`7.left.png` belong together. Names with more dots (`img.0.png`, `img.0.json`, `img.1.png`, `img.1.json`)
agree up to the first dot although they are several samples. These are separated by their stems, the names
without extensions (`img.0`, `img.1`): if a text or JSON file and an image have the same stem, and the other
files do not fit into that one sample (a second text or JSON, an image with another stem), then each text's or
JSON's stem is a sample, with the files whose names begin with it. A text or JSON named by the first part
alone (`7.json`) always belongs to the whole group.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2")
VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
TEXTS = ("txt", "text", "caption")
CLASSES = ("cls", "cls2")
# Formats that can run code when they are read. Others that no schema knows are ignored.
REFUSED = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz")
JSON = "json"
TEXT = "text"
MEDIA = "media"
ANCHORS = (TEXT, JSON)  # a sample has one of each at most
KNOWN = frozenset((*IMAGES, *VIDEOS, *TEXTS, *CLASSES, *REFUSED, JSON))

T = TypeVar("T")


class MemberName(NamedTuple):
    """A member's name in parts, each with its folder. key: up to the first dot. stem: without extensions."""

    key: str
    stem: str
    kind: str  # TEXT, JSON, MEDIA or another extension


def parse_name(path: str) -> MemberName:
    """Split a member's path into key, stem and kind."""
    folder, file = posixpath.split(path)
    stem, _, extension = file.rpartition(".")
    suffix = extension.lower()
    while stem.rpartition(".")[0] and stem.rpartition(".")[2].lower() in KNOWN:  # photo.jpg.json
        stem = stem.rpartition(".")[0]
    kind = TEXT if suffix in TEXTS else MEDIA if suffix in (*IMAGES, *VIDEOS) else suffix
    return MemberName(f"{folder}/{file.partition('.')[0]}", f"{folder}/{stem or file}", kind)


def group_members(members: Iterable[T], path_of: Callable[[T], str]) -> Iterator[list[T]]:
    """Group members, in the order of the tar, into samples.

    If members are sorted by name, only one sample is in memory at a time.
    """
    named = ((parse_name(path_of(member)), member) for member in members)
    for _, same_key in groupby(named, lambda pair: pair[0].key):
        group = _Group()
        for name, member in same_key:
            if group.is_complete_without(name):
                yield from group.samples()
                group = _Group()
            group.add(name, member)
        yield from group.samples()


class _Group:
    """Neighbours with one key: a sample, or several whose names have dots.

    anchors: stems of texts and JSON files. named_by_key: one of them has the key alone as its stem. paired: a
    text or JSON file and an image or video have the same stem.
    """

    def __init__(self) -> None:
        self._members: list[tuple[MemberName, Any]] = []
        self._anchors: set[str] = set()
        self._media_stems: set[str] = set()  # and every shorter stem that they begin with
        self._named_by_key = False
        self._paired = False

    def add(self, name: MemberName, member: Any) -> None:
        self._members.append((name, member))
        if name.kind in ANCHORS:
            self._anchors.add(name.stem)
            self._named_by_key |= name.stem == name.key
            self._paired |= name.stem in self._media_stems
        elif name.kind == MEDIA:
            self._media_stems.update(_stems(name))
            self._paired |= self._owner(name) is not None

    def is_complete_without(self, name: MemberName) -> bool:
        """Whether the group already is a sample that ``name`` does not belong to."""
        if not self._paired or self._named_by_key:
            return False
        if self._owner(name) is not None or name.stem in self._media_stems:
            return False
        anchor_kinds = {other.kind for other, _ in self._members if other.kind in ANCHORS}
        return name.kind == MEDIA or name.kind in anchor_kinds

    def samples(self) -> Iterator[list[Any]]:
        """Yield the members of each sample."""
        if not self._paired or self._named_by_key or self._fits_one_sample():
            yield [member for _, member in self._members]
            return
        samples: dict[str, list[Any]] = {}
        for name, member in self._members:
            samples.setdefault(self._owner(name) or name.stem, []).append(member)
        yield from samples.values()

    def _fits_one_sample(self) -> bool:
        """Whether there is at most one text and one JSON, and all images and videos belong to one of them."""
        anchors = {name for name, _ in self._members if name.kind in ANCHORS}
        owners = {self._owner(name) for name, _ in self._members if name.kind == MEDIA}
        return max(Counter(name.kind for name in anchors).values()) <= 1 and len(owners) == 1

    def _owner(self, name: MemberName) -> str | None:
        """Return the longest anchor that a member's stem begins with, by whole parts."""
        return next((stem for stem in _stems(name) if stem in self._anchors), None)


def _stems(name: MemberName) -> Iterator[str]:
    """Yield the stem, and what is left of it without its last parts, down to the key."""
    stem = name.stem
    while len(stem) > len(name.key):
        yield stem
        stem = stem.rpartition(".")[0]
    yield name.key
