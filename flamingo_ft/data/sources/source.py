"""A source of the recipe: its files, the rows in them, and the samples that the rows make."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data.files import is_system_file, resolve_unicode
from flamingo_ft.data.media_resolver import MediaResolver
from flamingo_ft.data.sample import Sample
from flamingo_ft.data.schemas import SCHEMAS, RowReader
from flamingo_ft.data.schemas.reader import detect_format
from flamingo_ft.errors import UserError

from .image_folder import is_image
from .tar_rows import TarRows
from .text_rows import DelimitedRows, JsonLines, JsonRows

MAX_ROWS_TRIED = 100  # to find a first row that can be parsed
GLOB_CHARACTERS = "*?["


class RowFile(Protocol):
    """The rows of one file, read on demand. Picklable: a copy opens the file again."""

    name: str
    """What error messages call the file."""
    indexed: bool
    """Whether rows can be read by number; if not, only `stream` may be called."""

    def __len__(self) -> int: ...

    def content(self, row: int) -> Any:
        """Return a row, not parsed yet if parsing can fail."""
        ...

    def stream(self) -> Iterator[Any]:
        """Yield what `content` returns for every row in order, in constant memory."""
        ...

    def parse(self, content: Any, where: str) -> Any:
        """Return the row's value, mostly a mapping.

        Raises UserError, beginning with ``where``, if it is malformed.
        """
        ...

    def find(self, key: str) -> Mapping[str, Any] | None:
        """Return the row with an id, in files whose rows have one."""
        ...


def _datasets_rows() -> Any:
    """Import the rows that `datasets` reads: most data are text, and it takes half a second to import."""
    from . import datasets_rows

    return datasets_rows


def _open_table(path: Path, indexed: bool) -> RowFile:
    return _datasets_rows().open_table(path, indexed=indexed)


READERS: dict[str, Callable[..., RowFile]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonRows,
    ".csv": DelimitedRows,
    ".tsv": DelimitedRows,
    ".tar": TarRows,
    ".tgz": TarRows,
    ".tar.gz": TarRows,
    ".parquet": _open_table,
    ".arrow": _open_table,
}


class RawRow(NamedTuple):
    """A row that is not parsed yet."""

    file: int  # index among the source's files
    row: int  # number in that file, from 0
    content: Any


class Source:
    """The rows of one entry of ``data.train`` or ``data.eval``, at most ``limit``.

    Picklable: a copy opens the files again. A malformed row raises when its sample is made and does not
    affect others.

    prepare: changes each parsed row before it is recognized and read.

    Attributes:
        name: what error messages call it.
        indexed: whether rows can be read by number; if not, only in order.
        format: the schema of its rows, from the recipe or detected in the first row.
        columns: those of the first row.
        unread: columns of text in the first row that the schema does not read.
    """

    def __init__(self, entry: DataSource, data: DataSection, prepare: Callable[[Any], Any] | None = None):
        self.name = source_name(entry)
        self._prepare = prepare
        self._change: Callable[[Sample], Sample] | None = None
        self._limit = entry.limit
        self._files: Sequence[RowFile] = open_row_files(entry)
        self.indexed = all(file.indexed for file in self._files)
        lengths = (len(file) for file in self._files) if self.indexed else ()
        self._starts = list(accumulate(lengths, initial=0))
        row, where = self._first_row()
        detected = entry.format == "auto"
        self.format = detect_format(row, entry.columns, where) if detected else entry.format
        resolver = MediaResolver(_image_root(entry), data.allow_urls)
        self._reader = RowReader(self.format, entry.columns, resolver, self.name, detected, entry.box_unit)
        self.columns = tuple(row) if isinstance(row, Mapping) else ()
        self.unread = self._reader.unread(row, where) if isinstance(row, Mapping) else ()

    @property
    def is_preference(self) -> bool:
        """Whether its rows are preference pairs."""
        return SCHEMAS[self.format].is_preference

    @property
    def has_label(self) -> bool:
        """Whether its rows are answers labelled good or bad."""
        return SCHEMAS[self.format].has_label

    def with_samples(self, change: Callable[[Sample], Sample]) -> Source:
        """Return a source of the same rows whose samples are changed. change: picklable."""
        changed = copy.copy(self)
        changed._change = change
        return changed

    def __len__(self) -> int:
        """Return the number of rows of an indexed source."""
        if not self.indexed:
            raise TypeError(f"{self.name} is read in order; its length is not known")
        return self._starts[-1] if self._limit is None else min(self._limit, self._starts[-1])

    def raw(self, i: int) -> RawRow:
        """Return row ``i`` of an indexed source, not parsed."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, got row {i}")
        file = bisect_right(self._starts, i) - 1
        row = i - self._starts[file]
        return RawRow(file, row, self._files[file].content(row))

    def stream(self) -> Iterator[RawRow]:
        """Yield the rows in order, not parsed, in constant memory."""
        rows = (
            RawRow(number, row, content)
            for number, file in enumerate(self._files)
            for row, content in enumerate(file.stream())
        )
        return islice(rows, self._limit)

    def sample(self, i: int, raw: RawRow) -> Sample:
        """Return the sample of a row.

        Raises UserError "FILE: row N: field: ...", N counted from 0 in that file.
        """
        file, where = self._files[raw.file], self.where(raw)
        sample = self._reader.read(self._parsed(raw), where, file.name, file.find)
        return sample if self._change is None else self._change(sample)

    def where(self, raw: RawRow) -> str:
        """Return what error messages call a row: "FILE: row N"."""
        return f"{self._files[raw.file].name}: row {raw.row}"

    def _parsed(self, raw: RawRow) -> Any:
        row = self._files[raw.file].parse(raw.content, self.where(raw))
        return row if self._prepare is None else self._prepare(row)

    def _first_row(self) -> tuple[Any, str]:
        """Return the first row that can be parsed, and what error messages call it."""
        first_error = None
        for raw in islice(self.stream(), MAX_ROWS_TRIED):
            try:
                return self._parsed(raw), self.where(raw)
            except UserError as error:
                first_error = first_error or error
        raise first_error or UserError(f"{self.name}: no rows; provide at least one sample")


def open_source(entry: DataSource, data: DataSection) -> Source:
    """Open the source that an entry of ``data.train`` or ``data.eval`` names.

    Raises UserError if it does not exist, cannot be read, has no rows, or rows of no known schema.
    """
    return Source(entry, data)


def read_samples(
    source: DataSource | Path, image_root: Path | None = None, data: DataSection | None = None
) -> list[Sample]:
    """Return all samples of an entry of a recipe, or of a file, a glob pattern or a folder.

    Raises UserError naming file, row (from 0, blank lines not counted) and field.

    Args:
        image_root: folder that image paths are relative to; default: the folder of the file.
        data: the section whose settings apply; default: the recipe's defaults.
    """
    entry = source if isinstance(source, DataSource) else DataSource(path=source, image_root=image_root)
    opened = open_source(entry, data or DataSection(train=(entry,)))
    return [opened.sample(index, raw) for index, raw in enumerate(opened.stream())]


def first_columns(entry: DataSource) -> tuple[str, ...]:
    """Return the columns of the first row that can be parsed; none if rows are not mappings."""
    for file in open_row_files(entry):
        for number, content in enumerate(islice(file.stream(), MAX_ROWS_TRIED)):
            with suppress(UserError):
                row = file.parse(content, f"{file.name}: row {number}")
                return tuple(row) if isinstance(row, Mapping) else ()
    return ()


def source_name(entry: DataSource) -> str:
    """Return what error messages call a source."""
    return str(entry.path) if entry.path is not None else f"{entry.hub}[{entry.data_files or entry.split}]"


def open_row_files(entry: DataSource) -> list[RowFile]:
    """Open the files of a source, in the order of their names."""
    if entry.path is None:
        assert entry.hub is not None  # the recipe is checked for having one of the two
        load_hub = _datasets_rows().load_hub
        keys = ("config", "data_files", "split", "revision", "streaming")
        return [load_hub(entry.hub, **{key: getattr(entry, key) for key in keys})]
    path = resolve_unicode(entry.path)
    if path.is_dir():
        return [_open_folder(path, entry)]
    return [_open_file(path, entry.streaming) for path in _matching(path)]


def _image_root(entry: DataSource) -> Path | None:
    """Return the folder that image paths are relative to; None for a Hub dataset without ``image_root``."""
    if entry.image_root is not None or entry.path is None:
        return entry.image_root and resolve_unicode(entry.image_root)
    path = resolve_unicode(entry.path)
    return path if path.is_dir() else path.parent


def _matching(path: Path) -> Sequence[Path]:
    """Return the file itself, or all files that match a glob pattern in its name, except system files."""
    if path.is_file():
        return [path]
    is_pattern = any(character in path.name for character in GLOB_CHARACTERS)
    matching = sorted(path.parent.glob(path.name)) if is_pattern else []
    files = [file for file in matching if file.is_file() and not is_system_file(file.name)]
    if not files:
        raise UserError(
            f"{path}: no such data file; check the path (a recipe's paths start from the recipe's folder)"
        )
    return files


def _open_file(path: Path, streaming: bool) -> RowFile:
    name = path.name.lower()
    suffix = next((suffix for suffix in READERS if name.endswith(suffix)), None)
    if suffix is None:
        got = f"a {path.suffix} file" if path.suffix else "a file without an extension"
        raise UserError(f"{path}: expected one of {', '.join(READERS)}, or a folder of images, got {got}")
    return READERS[suffix](path, indexed=not streaming)


def _open_folder(path: Path, entry: DataSource) -> RowFile:
    """Open a folder of images, or of a dataset's files."""
    has_images = any(
        is_image(file) and not is_system_file(str(file.relative_to(path))) for file in path.rglob("*")
    )
    is_saved_dataset = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    rows = _datasets_rows()
    load = rows.load_image_folder if has_images and not is_saved_dataset else rows.load_folder
    return load(path, entry.split, entry.streaming)
