"""A source of the recipe: rows from wherever they are, and the samples that they make."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any

from flamingo_ft.config import DataSection, DataSource
from flamingo_ft.data.locate import Locator
from flamingo_ft.data.sample import Sample
from flamingo_ft.data.schemas.reader import RowReader, schema_of
from flamingo_ft.errors import UserError

from .opening import name_of, open_files, root_of
from .rows import RawRow, Rows

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
        self.name = name_of(entry)
        self._limit = entry.limit
        self._files: Sequence[Rows] = open_files(entry)
        self.indexed = all(file.indexed for file in self._files)
        self._starts = (
            list(accumulate((len(file) for file in self._files), initial=0)) if self.indexed else [0]
        )
        row, where = self._first_row()
        self.format = entry.format if entry.format != "auto" else schema_of(row, entry.columns, where)
        locator = Locator(root_of(entry), data.allow_urls)
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
