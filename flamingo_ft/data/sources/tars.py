"""Tars of a WebDataset: the files of a row stand one after another and share their name up to the first dot."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from flamingo_ft.data.fields import MEMBERS, kind
from flamingo_ft.data.mapped_file import MappedFile
from flamingo_ft.errors import UserError

from .text_rows import parse_json

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2")
VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
TEXTS = ("txt", "text", "caption")
# Formats that run code when they are read, or may. Others that no schema knows are left alone.
REFUSED = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz")


class Member(NamedTuple):
    """A file in a tar, found by where it stands."""

    name: str
    start: int
    size: int


class Damaged(NamedTuple):
    """Stands for the row at which a tar cannot be read on."""

    reason: str


class TarRows:
    """Rows of one tar: by number in a plain one, in order alone in a compressed one."""

    def __init__(self, path: Path, indexed: bool):
        self.name = str(path)
        self.indexed = indexed and path.suffix.lower() == ".tar"
        self._file = MappedFile(path)
        self._index: list[list[Member] | Damaged] = list(self._members()) if self.indexed else []

    def __len__(self) -> int:
        return len(self._index)

    def content(self, row: int) -> dict[str, bytes] | Damaged:
        members = self._index[row]
        if isinstance(members, Damaged):
            return members
        view = self._file.view()
        return {name: view[start : start + size] for name, start, size in members}

    def stream(self) -> Iterator[dict[str, bytes] | Damaged]:
        with open(self.name, "rb") as file:
            opened = _Opened(file, "r|*")
            for _, infos in groupby(opened.infos(), lambda info: _key(info.name)):
                row = opened.read(infos)
                if row:
                    yield row
            if opened.damage:
                yield opened.damage

    def parse(self, content: dict[str, bytes] | Damaged, where: str) -> Mapping[str, Any]:
        if isinstance(content, Damaged):
            raise UserError(f"{where}: not a readable tar ({content.reason}); replace {self.name}")
        return _row(content, where)

    def find(self, key: str) -> None:
        return None

    def _members(self) -> Iterator[list[Member] | Damaged]:
        with open(self.name, "rb") as file:
            opened = _Opened(file, "r:")
            for _, infos in groupby(opened.infos(), lambda info: _key(info.name)):
                members = [Member(info.name, info.offset_data, info.size) for info in infos]
                if members[-1].start + members[-1].size > self._file.size:
                    yield Damaged("it ends within a file")
                    return
                yield members
            if opened.damage:
                yield opened.damage


class _Opened:
    """A tar being read from its beginning to its end, or to where it is damaged."""

    def __init__(self, file: Any, mode: str):
        self.damage: Damaged | None = None
        self._file = file
        self._mode = mode

    def infos(self) -> Iterator[tarfile.TarInfo]:
        """The files; no folders, and no links, which could lead out of the tar."""
        try:
            with tarfile.open(fileobj=self._file, mode=self._mode) as self._tar:
                for info in self._tar:
                    self._tar.members = []  # tarfile keeps them all
                    if info.isreg():
                        yield info
                self.damage = _damaged_header(self._file.name, self._tar.offset)
        except (tarfile.TarError, EOFError, OSError) as error:
            self.damage = Damaged(str(error) or "it ends too early")

    def read(self, infos: Iterable[tarfile.TarInfo]) -> dict[str, bytes] | None:
        """The content of files; None where the tar is damaged within them."""
        try:
            return {info.name: self._tar.extractfile(info).read() for info in infos}
        except (tarfile.TarError, EOFError, OSError) as error:
            self.damage = Damaged(str(error) or "it ends too early")
            return None


def _damaged_header(path: str, offset: int) -> Damaged | None:
    """What ended a plain tar early: tarfile takes a header that it cannot read for the end."""
    if not path.lower().endswith(".tar"):
        return None
    with open(path, "rb") as file:
        file.seek(offset)
        return Damaged(f"a damaged header at byte {offset}") if any(file.read(tarfile.BLOCKSIZE)) else None


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _row(content: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The files of a row as its columns: image, video, text, and what stands in its JSON."""
    row: dict[str, Any] = {MEMBERS: content}
    pictures = []
    for name, data in content.items():
        suffix = name.rpartition(".")[2].lower()
        if suffix in REFUSED:
            remedy = "store images as PNG or JPEG, and the rest as JSON"
            raise UserError(f"{where}: found {name}, which may run code when it is read; {remedy}")
        if suffix == "json":
            row |= _object(data, f"{where}: {name}")
        elif suffix in TEXTS:
            row["text"] = _text(data, f"{where}: {name}")
        elif suffix in VIDEOS:
            row["video"] = data
        elif suffix in IMAGES:
            pictures.append(data)
    if pictures and "image_info" not in row:  # an interleaved document names its pictures itself
        row |= {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
    return row


def _object(data: bytes, where: str) -> dict[str, Any]:
    value = parse_json(_text(data, where), where, "an object")
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {kind(value)}, wanted an object")
    return value


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
