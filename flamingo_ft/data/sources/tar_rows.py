"""WebDataset tars: the files of a row follow one another and share the beginning of their names."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from flamingo_ft.data.fields import TAR_MEMBERS, type_name
from flamingo_ft.data.files import MappedFile, is_system_file, same_name
from flamingo_ft.errors import UserError

from .tar_samples import CLASSES, IMAGES, JSON, REFUSED, TEXTS, VIDEOS, group_members
from .text_rows import decode_utf8, parse_json


class Member(NamedTuple):
    """Where a file's content is in a tar, in bytes."""

    name: str
    start: int
    size: int


class DamagedTar(NamedTuple):
    """Takes the place of the row at which a tar becomes unreadable."""

    reason: str


class DuplicateMember(NamedTuple):
    """Takes the place of a row that has two files of one name."""

    name: str


RowFault = DamagedTar | DuplicateMember
Content = dict[str, bytes] | RowFault


class TarRows:
    """Rows of one WebDataset tar: by number in an uncompressed one, only in order in a compressed one."""

    def __init__(self, path: Path, indexed: bool):
        self.name = str(path)
        self.indexed = indexed and path.suffix.lower() == ".tar"
        self._file = MappedFile(path)
        self._index: list[list[Member] | RowFault] = list(self._members()) if self.indexed else []

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
            reader = _TarReader(file, "r|*")
            for files in group_members(reader.contents(), itemgetter(0)):
                if any(content is None for _, content in files):
                    break  # damaged within this row
                yield _duplicate([name for name, _ in files]) or cast(dict[str, bytes], dict(files))
            if reader.damage:
                yield reader.damage

    def parse(self, content: Content, where: str) -> Mapping[str, Any]:
        if isinstance(content, DamagedTar):
            raise UserError(f"{where}: not a readable tar ({content.reason}); replace {self.name}")
        if isinstance(content, DuplicateMember):
            raise UserError(f"{where}: the tar holds {content.name} more than once; keep one of them")
        return _row(content, where)

    def find(self, key: str) -> None:
        return None

    def _members(self) -> Iterator[list[Member] | RowFault]:
        with open(self.name, "rb") as file:
            reader = _TarReader(file, "r:")
            for infos in group_members(reader.infos(), attrgetter("name")):
                members = [Member(info.name, info.offset_data, info.size) for info in infos]
                if any(start + size > self._file.size for _, start, size in members):
                    yield DamagedTar("it ends within a file")
                    return
                yield _duplicate([member.name for member in members]) or members
            if reader.damage:
                yield reader.damage


class _TarReader:
    """Reads a tar from start to end, or to where it is damaged; `damage` then says why."""

    def __init__(self, file: Any, mode: Literal["r:", "r|*"]):
        self.damage: DamagedTar | None = None
        self._file = file
        self._mode = mode

    def infos(self) -> Iterator[tarfile.TarInfo]:
        """Yield the files. Folders, links (which could lead out of the tar) and system files are skipped."""
        try:
            with tarfile.open(fileobj=self._file, mode=self._mode) as self._tar:
                for info in self._tar:
                    # tarfile would keep them all; typeshed leaves the attribute out
                    self._tar.members = []  # pyrefly: ignore[missing-attribute]
                    info.name = posixpath.normpath(info.name)
                    if info.isreg() and not is_system_file(info.name):
                        yield info
                self.damage = _damaged_header(self._file.name, self._tar.offset)
        except (tarfile.TarError, EOFError, OSError) as error:
            self.damage = DamagedTar(str(error) or "it ends too early")

    def contents(self) -> Iterator[tuple[str, bytes | None]]:
        """Yield the files' names and contents; at damage within a file None, and nothing after it."""
        for info in self.infos():
            content = self._read(info)
            yield info.name, content
            if content is None:
                return

    def _read(self, info: tarfile.TarInfo) -> bytes | None:
        try:
            file = self._tar.extractfile(info)
            return b"" if file is None else file.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            self.damage = DamagedTar(str(error) or "it ends too early")
            return None


def _duplicate(names: Sequence[str]) -> DuplicateMember | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return DuplicateMember(name)
        seen.add(name)
    return None


def _damaged_header(path: str, offset: int) -> DamagedTar | None:
    """Return what ended an uncompressed tar early: tarfile takes a header that it cannot read for the end."""
    if not path.lower().endswith(".tar"):
        return None
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    return DamagedTar(f"a damaged header at byte {offset}") if any(block) else None


def _row(content: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """Return the files of a row as its columns: image, video, text, class, and what its JSON holds.

    Raises UserError for a second text or JSON, and for a file that can run code.
    """
    row: dict[str, Any] = {TAR_MEMBERS: content}
    refused = next((name for name in content if _suffix(name) in REFUSED), None)
    if refused is not None:
        remedy = "store images as PNG or JPEG, and the rest as JSON"
        raise UserError(f"{where}: a file that may run code when it is read, got {refused}; {remedy}")
    json_name = _single([JSON], content, where)
    if json_name is not None:
        row |= _json_object(content[json_name], f"{where}: {json_name}")
    for column, suffixes in (("text", TEXTS), ("cls", CLASSES)):
        name = _single(suffixes, content, where)
        if name is not None:
            place = f"{where}: {name}"
            text = decode_utf8(content[name], place, "utf-8-sig")
            _check_agrees(row.get(column), text, column, place)
            row[column] = text
    _add_media(row, "image", {name: data for name, data in content.items() if _suffix(name) in IMAGES}, where)
    _add_media(row, "video", {name: data for name, data in content.items() if _suffix(name) in VIDEOS}, where)
    return row


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _single(suffixes: Sequence[str], content: Mapping[str, bytes], where: str) -> str | None:
    """Return the one file with any of these suffixes. Raises UserError if there are two."""
    names = [name for name in content if _suffix(name) in suffixes]
    if len(names) > 1:
        what = "JSON files" if JSON in suffixes else "texts"
        remedy = "keep one of them, or give each sample a name of its own before the first dot"
        raise UserError(f"{where}: the sample has two {what}, got {names[0]} and {names[1]}; {remedy}")
    return names[0] if names else None


def _check_agrees(in_json: Any, text: str, column: str, where: str) -> None:
    """Raise UserError if the sample's JSON has another text in the same column."""
    if isinstance(in_json, str) and in_json.strip() and in_json.strip() != text.strip():
        raise UserError(f"{where}: differs from {column!r} in the sample's JSON file; keep one of them")


def _add_media(row: dict[str, Any], column: str, files: Mapping[str, bytes], where: str) -> None:
    """Put images or videos into their column: those that the JSON names, in that order, else all of them."""
    if not files or "image_info" in row:  # an interleaved document names its images itself
        return
    plural = f"{column}s"
    if isinstance(row.get(plural), list) and row[plural]:
        row[plural] = [
            _named_file(name, files, f"{where}: {plural}[{index}]") for index, name in enumerate(row[plural])
        ]
        return
    named = _find_file(row.get(column), files)
    if named is not None:
        row[column] = named
    elif len(files) == 1:
        row[column] = next(iter(files.values()))
    else:
        row[plural] = [*files.values()]


def _named_file(name: Any, files: Mapping[str, bytes], where: str) -> bytes:
    data = _find_file(name, files)
    if data is None:
        got = repr(name) if isinstance(name, str) else type_name(name)
        raise UserError(f"{where}: names no file of the sample, got {got}; name one of {', '.join(files)}")
    return data


def _find_file(name: Any, files: Mapping[str, bytes]) -> bytes | None:
    """Return the file of that name, with or without the key that all files of a sample begin with."""
    if not isinstance(name, str):
        return None
    for file, data in files.items():
        base = posixpath.basename(file)
        if any(same_name(name, candidate) for candidate in (file, base, base.partition(".")[2])):
            return data
    return None


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    value = parse_json(decode_utf8(data, where, "utf-8-sig"), where, "an object")
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, got {type_name(value)}")
    return value
