"""Tars of a WebDataset: the files of a row stand one after another and share the beginning of their names."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from flamingo_ft.data.fields import TAR_MEMBERS, type_name
from flamingo_ft.data.files import MappedFile, is_system_file, same_name
from flamingo_ft.errors import UserError

from .tar_samples import CLASSES, IMAGES, JSON, REFUSED, TEXTS, VIDEOS, group_members
from .text_rows import parse_json


class Member(NamedTuple):
    """A file in a tar, found by where it stands."""

    name: str
    start: int
    size: int


class Damaged(NamedTuple):
    """Stands for the row at which a tar cannot be read on."""

    reason: str


class Repeated(NamedTuple):
    """Stands for a row two of whose files have the same name."""

    name: str


Content = dict[str, bytes] | Damaged | Repeated


class TarRows:
    """Rows of one tar: by number in a plain one, in order alone in a compressed one."""

    def __init__(self, path: Path, indexed: bool):
        self.name = str(path)
        self.indexed = indexed and path.suffix.lower() == ".tar"
        self._file = MappedFile(path)
        self._index: list[list[Member] | Damaged | Repeated] = list(self._members()) if self.indexed else []

    def __len__(self) -> int:
        return len(self._index)

    def content(self, row: int) -> Content:
        members = self._index[row]
        if not isinstance(members, list):
            return members
        view = self._file.view()
        return {name: view[start : start + size] for name, start, size in members}

    def stream(self) -> Iterator[Content]:
        with open(self.name, "rb") as file:
            opened = _Opened(file, "r|*")
            for files in group_members(opened.contents(), itemgetter(0)):
                if any(content is None for _, content in files):
                    break
                yield _repeated([name for name, _ in files]) or dict(files)
            if opened.damage:
                yield opened.damage

    def parse(self, content: Content, where: str) -> Mapping[str, Any]:
        if isinstance(content, Damaged):
            raise UserError(f"{where}: not a readable tar ({content.reason}); replace {self.name}")
        if isinstance(content, Repeated):
            raise UserError(f"{where}: the tar holds {content.name} more than once; keep one of them")
        return _row(content, where)

    def find(self, key: str) -> None:
        return None

    def _members(self) -> Iterator[list[Member] | Damaged | Repeated]:
        with open(self.name, "rb") as file:
            opened = _Opened(file, "r:")
            for infos in group_members(opened.infos(), attrgetter("name")):
                members = [Member(info.name, info.offset_data, info.size) for info in infos]
                if any(start + size > self._file.size for _, start, size in members):
                    yield Damaged("it ends within a file")
                    return
                yield _repeated([member.name for member in members]) or members
            if opened.damage:
                yield opened.damage


class _Opened:
    """A tar being read from its beginning to its end, or to where it is damaged."""

    def __init__(self, file: Any, mode: str):
        self.damage: Damaged | None = None
        self._file = file
        self._mode = mode

    def infos(self) -> Iterator[tarfile.TarInfo]:
        """The files; no folders, no links, which could lead out of the tar, and nothing that a system left there."""
        try:
            with tarfile.open(fileobj=self._file, mode=self._mode) as self._tar:
                for info in self._tar:
                    self._tar.members = []  # tarfile keeps them all
                    info.name = posixpath.normpath(info.name)
                    if info.isreg() and not is_system_file(info.name):
                        yield info
                self.damage = _damaged_header(self._file.name, self._tar.offset)
        except (tarfile.TarError, EOFError, OSError) as error:
            self.damage = Damaged(str(error) or "it ends too early")

    def contents(self) -> Iterator[tuple[str, bytes | None]]:
        """The files' names and contents; None, and no more files, where the tar is damaged within one."""
        for info in self.infos():
            content = self._read(info)
            yield info.name, content
            if content is None:
                return

    def _read(self, info: tarfile.TarInfo) -> bytes | None:
        try:
            return self._tar.extractfile(info).read()
        except (tarfile.TarError, EOFError, OSError) as error:
            self.damage = Damaged(str(error) or "it ends too early")
            return None


def _repeated(names: Sequence[str]) -> Repeated | None:
    seen: set[str] = set()
    return next((Repeated(name) for name in names if name in seen or seen.add(name)), None)


def _damaged_header(path: str, offset: int) -> Damaged | None:
    """What ended a plain tar early: tarfile takes a header that it cannot read for the end."""
    if not path.lower().endswith(".tar"):
        return None
    with open(path, "rb") as file:
        file.seek(offset)
        return Damaged(f"a damaged header at byte {offset}") if any(file.read(tarfile.BLOCKSIZE)) else None


def _row(content: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The files of a row as its columns: image, video, text, class, and what its JSON holds.

    Raises UserError for a second text or JSON, and for a file that may run code.
    """
    row: dict[str, Any] = {TAR_MEMBERS: content}
    refused = next((name for name in content if _suffix(name) in REFUSED), None)
    if refused is not None:
        remedy = "store images as PNG or JPEG, and the rest as JSON"
        raise UserError(f"{where}: found {refused}, which may run code when it is read; {remedy}")
    json_name = _only([JSON], content, where)
    if json_name is not None:
        row |= _object(content[json_name], f"{where}: {json_name}")
    for column, suffixes in (("text", TEXTS), ("cls", CLASSES)):
        name = _only(suffixes, content, where)
        if name is not None:
            row[column] = _same_or_new(
                row, column, _text(content[name], f"{where}: {name}"), f"{where}: {name}"
            )
    _add_media(row, "image", {name: data for name, data in content.items() if _suffix(name) in IMAGES}, where)
    _add_media(row, "video", {name: data for name, data in content.items() if _suffix(name) in VIDEOS}, where)
    return row


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _only(suffixes: Sequence[str], content: Mapping[str, bytes], where: str) -> str | None:
    """The one file of a kind. UserError that names two."""
    names = [name for name in content if _suffix(name) in suffixes]
    if len(names) > 1:
        what = "JSON files" if JSON in suffixes else "texts"
        remedy = "keep one of them, or give each sample a name of its own before the first dot"
        raise UserError(f"{where}: the sample has two {what}, got {names[0]} and {names[1]}; {remedy}")
    return names[0] if names else None


def _same_or_new(row: Mapping[str, Any], column: str, text: str, where: str) -> str:
    """The text, which the row's JSON may hold too. UserError where that says something else."""
    held = row.get(column)
    if isinstance(held, str) and held.strip() and held.strip() != text.strip():
        raise UserError(f"{where}: differs from {column!r} in the sample's JSON file; keep one of them")
    return text


def _add_media(row: dict[str, Any], column: str, files: Mapping[str, bytes], where: str) -> None:
    """Put images or videos into their column: those that the sample's JSON names, in that order, else all of them."""
    if not files or "image_info" in row:  # an interleaved document names its images itself
        return
    several = f"{column}s"
    if isinstance(row.get(several), list) and row[several]:
        places = [f"{where}: {several}[{index}]" for index in range(len(row[several]))]
        row[several] = [_named(name, files, place) for name, place in zip(row[several], places, strict=True)]
    elif _find(row.get(column), files) is not None:
        row[column] = _find(row[column], files)
    elif len(files) == 1:
        row[column] = next(iter(files.values()))
    else:
        row[several] = [*files.values()]


def _named(name: Any, files: Mapping[str, bytes], where: str) -> bytes:
    found = _find(name, files)
    if found is None:
        got = repr(name) if isinstance(name, str) else type_name(name)
        raise UserError(f"{where}: names no file of the sample, got {got}; name one of {', '.join(files)}")
    return found


def _find(name: Any, files: Mapping[str, bytes]) -> bytes | None:
    """The file of that name, with or without the key that all files of a sample begin with."""
    for file, data in files.items():
        base = posixpath.basename(file)
        if isinstance(name, str) and any(
            same_name(name, one) for one in (file, base, base.partition(".")[2])
        ):
            return data
    return None


def _object(data: bytes, where: str) -> dict[str, Any]:
    value = parse_json(_text(data, where), where, "an object")
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {type_name(value)}, wanted an object")
    return value


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
