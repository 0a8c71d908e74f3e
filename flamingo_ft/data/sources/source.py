"""What a file of rows is to a source, whatever its kind.

From an entry of the recipe to its files, each read by what its kind takes.

A source of the recipe: rows from wherever they are, and the samples that they make.

All samples of a source at once, for data that fits in memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data.files import is_system_file, resolve_unicode
from flamingo_ft.data.media_resolver import MediaResolver
from flamingo_ft.data.sample import Sample
from flamingo_ft.data.schemas.reader import RowReader, detect_format
from flamingo_ft.errors import UserError

from . import datasets_rows
from .csv_rows import DelimitedRows
from .tar_rows import TarRows
from .tar_samples import IMAGES
from .text_rows import JsonLines, JsonRows


class RawRow(NamedTuple):
    """A row as it stands in its file, and which it is: enough to parse it, and to say where it came from."""

    file: int  # which of the source's files
    row: int  # its number in that file
    content: Any


class RowFile(Protocol):
    """The rows of one file, read as late as possible. Picklable; files are opened anew where it is unpickled."""

    name: str
    """What errors call it."""
    indexed: bool
    """Whether rows can be had by number; else `stream` alone may be called."""

    def __len__(self) -> int: ...

    def content(self, row: int) -> Any:
        """A row, unparsed where parsing may fail."""
        ...

    def stream(self) -> Iterator[Any]:
        """The same, of every row in order, in constant memory."""
        ...

    def parse(self, content: Any, where: str) -> Any:
        """The row's value, mostly a mapping. UserError, beginning with ``where``, when it is malformed."""
        ...

    def find(self, key: str) -> Mapping[str, Any] | None:
        """The row with that key, in files that name their rows."""
        ...


PATTERN_MARKS = "*?["
READERS = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonRows,
    ".csv": DelimitedRows,
    ".tsv": DelimitedRows,
    ".tar": TarRows,
    ".tgz": TarRows,
    ".tar.gz": TarRows,
    ".parquet": None,  # these two through `datasets`
    ".arrow": None,
}
KINDS = ", ".join(READERS)


def source_name(entry: DataSource) -> str:
    return str(entry.path) if entry.path is not None else f"{entry.hub}[{entry.split}]"


def image_root_of(entry: DataSource) -> Path | None:
    """The folder that image paths start from; None for the Hub's rows where the recipe names none."""
    if entry.image_root is not None or entry.path is None:
        return entry.image_root and resolve_unicode(entry.image_root)
    path = resolve_unicode(entry.path)
    return path if path.is_dir() else path.parent


def open_row_files(entry: DataSource) -> list[RowFile]:
    """The files of an entry, in the order of their names."""
    if entry.path is None:
        return [datasets_rows.load_hub(entry.hub, entry.config, entry.split, entry.revision, entry.streaming)]
    path = resolve_unicode(entry.path)
    if path.is_dir():
        return [_open_folder(path, entry)]
    return [_open_file(path, entry.streaming) for path in _matching(path)]


def _matching(path: Path) -> Sequence[Path]:
    """The file itself, or all that fit where its name is a pattern, but what operating systems left there."""
    if path.is_file():
        return [path]
    found = sorted(path.parent.glob(path.name)) if any(mark in path.name for mark in PATTERN_MARKS) else []
    files = [one for one in found if one.is_file() and not is_system_file(one.name)]
    if not files:
        raise UserError(
            f"{path}: no such data file; check the path (a recipe's paths start from the recipe's folder)"
        )
    return files


def _open_file(path: Path, streaming: bool) -> RowFile:
    name = path.name.lower()
    suffix = next((suffix for suffix in READERS if name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(
            f"{path}: found a {path.suffix or 'nameless'} file, wanted one of {KINDS}, or a folder of images"
        )
    reader = READERS[suffix]
    return (
        datasets_rows.load_files(path, streaming) if reader is None else reader(path, indexed=not streaming)
    )


def _open_folder(path: Path, entry: DataSource) -> RowFile:
    """A folder of images, or of a dataset's files."""
    holds_images = any(
        _is_image(file) and not is_system_file(str(file.relative_to(path))) for file in path.rglob("*")
    )
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    load = datasets_rows.load_image_folder if holds_images and not saved else datasets_rows.load_folder
    return load(path, entry.split, entry.streaming)


def _is_image(file: Path) -> bool:
    return file.suffix.lower().removeprefix(".") in IMAGES


ROWS_TRIED = 100  # in search of a first row that can be parsed


def open_source(entry: DataSource, data: DataSection) -> Source:
    """The source that an entry of ``data.train`` or ``data.eval`` names.

    Raises UserError for what is not there, cannot be read, has no rows, or rows of no known schema.
    """
    return Source(entry, data)


class Source:
    """Rows of one entry, its first ``limit``; picklable, and read anew wherever it is unpickled.

    name: what errors call it. indexed: rows can be had by number (False: in order alone). format: the schema of its
    rows, recognised or named. unread: columns of text in the first row that the schema does not read.
    A malformed row fails when its sample is made, and leaves the others alone.
    """

    def __init__(self, entry: DataSource, data: DataSection):
        self.name = source_name(entry)
        self._limit = entry.limit
        self._files: Sequence[RowFile] = open_row_files(entry)
        self.indexed = all(file.indexed for file in self._files)
        self._starts = (
            list(accumulate((len(file) for file in self._files), initial=0)) if self.indexed else [0]
        )
        row, where = self._first_row()
        self.format = entry.format if entry.format != "auto" else detect_format(row, entry.columns, where)
        locator = MediaResolver(image_root_of(entry), data.allow_urls)
        self._reader = RowReader(
            self.format, entry.columns, locator, self.name, guessed=entry.format == "auto"
        )
        self.unread = self._reader.unread(row, where) if isinstance(row, Mapping) else ()

    def __len__(self) -> int:
        """Rows, of an indexed source."""
        if not self.indexed:
            raise TypeError(f"{self.name} is read in order; its length is not known")
        return self._starts[-1] if self._limit is None else min(self._limit, self._starts[-1])

    def raw(self, i: int) -> RawRow:
        """Row ``i``, not parsed; of an indexed source."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, and none of number {i}")
        file = bisect_right(self._starts, i) - 1
        row = i - self._starts[file]
        return RawRow(file, row, self._files[file].content(row))

    def stream(self) -> Iterator[RawRow]:
        """The rows in order, not parsed, in constant memory."""
        rows = (
            RawRow(number, row, content)
            for number, file in enumerate(self._files)
            for row, content in enumerate(file.stream())
        )
        return islice(rows, self._limit)

    def sample(self, i: int, raw: RawRow) -> Sample:
        """The sample of a row. UserError "FILE: row N: field: ...", N its 0-based number in that file."""
        file, where = self._files[raw.file], self.where(raw)
        return self._reader.read(file.parse(raw.content, where), where, file.name, file.find)

    def where(self, raw: RawRow) -> str:
        """What errors call a row: "FILE: row N"."""
        return f"{self._files[raw.file].name}: row {raw.row}"

    def _first_row(self) -> tuple[Any, str]:
        """The first row that can be parsed, and what errors call it."""
        first_error = None
        for raw in islice(self.stream(), ROWS_TRIED):
            try:
                return self._files[raw.file].parse(raw.content, self.where(raw)), self.where(raw)
            except UserError as error:
                first_error = first_error or error
        raise first_error or UserError(f"{self.name}: found no rows; wanted at least one sample")


def read_samples(
    source: DataSource | Path, image_root: Path | None = None, data: DataSection | None = None
) -> list[Sample]:
    """The samples of an entry of a recipe, or of a file, a pattern of files or a folder, checked.

    image_root: where a file's image paths start from, by default its folder. data: whose settings count, by default
    the usual ones. Raises UserError naming file, row (0-based, blank lines not counted) and field.
    """
    entry = source if isinstance(source, DataSource) else DataSource(path=source, image_root=image_root)
    opened = open_source(entry, data or DataSection(train=(entry,)))
    return [opened.sample(index, raw) for index, raw in enumerate(opened.stream())]
