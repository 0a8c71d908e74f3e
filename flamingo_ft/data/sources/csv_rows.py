"""CSV and TSV files, and which character separates their cells: not always what the file's name says."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flamingo_ft.data.files import skip_bom
from flamingo_ft.data.schemas.columns import normalize_name
from flamingo_ft.data.schemas.registry import all_fields
from flamingo_ft.errors import UserError

from .text_rows import WHITESPACE, TextRows, decode_utf8

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
USUAL_DELIMITER = {".csv": ",", ".tsv": "\t"}
HEAD_LINES = 64
SEP_LINE = re.compile(rb'"?sep=([,;\t])"?\r?\n')  # Excel writes it before the header
WELL_FORMED = "close every quote and end lines with a line feed"
# csv allows 131,072 characters by default; an image as base64 is longer.
MAX_FIELD_CHARACTERS = (1 << 31) - 1


class Dialect(NamedTuple):
    """delimiter: between cells. header: byte offset of the header line."""

    delimiter: str
    header: int


class DelimitedRows(TextRows):
    """A text file with a header, its cells separated by commas, semicolons or tabs.

    An empty cell is null; `nan` is NaN, as pandas writes a missing number.
    """

    def __init__(self, path: Path, indexed: bool):
        self._delimiter, self._header = detect_dialect(path, skip_bom(path))
        super().__init__(path, indexed)
        header = next(self._records(), (0, b""))[1]
        self._columns = self._cells(decode_utf8(header, str(path)), str(path)) if header.strip() else []
        if len({*self._columns}) != len(self._columns):
            raise UserError(f"{path}: the first line has several columns of the same name; name each once")

    def content(self, row: int) -> bytes:
        end = int(self._starts[row + 1]) if row + 1 < len(self._starts) else self._file.size
        return self._file.view()[int(self._starts[row]) : end]

    def stream(self) -> Iterator[bytes]:
        yield from (content for _, content in islice(self._records(), 1, None))

    def parse(self, content: bytes, where: str) -> Mapping[str, Any]:
        cells = self._cells(decode_utf8(content, where), where)
        if len(cells) != len(self._columns):
            expected = f"{len(self._columns)} cells ({', '.join(self._columns)})"
            remedy = f"put text with {DELIMITERS[self._delimiter]} in quotes"
            raise UserError(f"{where}: expected {expected}, got {len(cells)}; {remedy}")
        return {name: _cell(cell) for name, cell in zip(self._columns, cells, strict=True)}

    def _index(self) -> np.ndarray:
        return np.fromiter((start for start, _ in self._records()), np.int64)[1:]

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """Yield each record that is not blank and its byte offset; a record with quoted line breaks has
        several lines."""
        csv.field_size_limit(MAX_FIELD_CHARACTERS)
        with open(self.name, "rb") as file:
            file.seek(self._header)
            lines: list[bytes] = []

            def texts() -> Iterator[str]:
                # Latin-1 decodes any byte: only the ends of records are found here, and parse() refuses what
                # is not UTF-8.
                for line in file:
                    lines.append(line)
                    yield line.decode("latin-1")

            start, reader = self._header, csv.reader(texts(), delimiter=self._delimiter)
            while _advance(reader):
                record = b"".join(lines)
                if record.strip(WHITESPACE):
                    yield start, record
                start += len(record)
                lines.clear()

    def _cells(self, text: str, where: str) -> list[str]:
        csv.field_size_limit(MAX_FIELD_CHARACTERS)  # per process, and a worker may not have made the index
        try:
            lines = io.StringIO(text, newline="\n")
            return next(csv.reader(lines, delimiter=self._delimiter, strict=True), [])
        except csv.Error as error:
            raise UserError(
                f"{where}: not {self._delimiter!r}-separated text ({error}); {WELL_FORMED}"
            ) from None


def detect_dialect(path: Path, begin: int) -> Dialect:
    """Return the delimiter that the file itself states, or else the one that fits its first lines best.

    The best delimiter gives the most names of known fields in the header; on a tie, a header with as many
    cells as the first row; on a tie, the most cells. Delimiters in quotes do not count. A header without a
    delimiter is a single column.
    """
    with open(path, "rb") as file:
        file.seek(begin)
        lines = [*islice(file, HEAD_LINES)]
    stated = SEP_LINE.fullmatch(lines[0]) if lines else None
    if stated:
        return Dialect(stated[1].decode(), begin + len(lines[0]))
    usual = USUAL_DELIMITER[path.suffix.lower()]
    candidates = (usual, *(delimiter for delimiter in DELIMITERS if delimiter != usual))
    return Dialect(max(candidates, key=lambda delimiter: _fit(lines, delimiter)), begin)


def _fit(lines: list[bytes], delimiter: str) -> tuple[int, bool, int]:
    """Return a sort key for how well a delimiter fits the first lines."""
    header, first = _first_records(lines, delimiter)
    if len(header) < 2:
        return 0, False, 0
    fields = all_fields()
    known = sum(normalize_name(name) in fields for name in header)
    return known, first is None or len(first) == len(header), len(header)


def _first_records(lines: list[bytes], delimiter: str) -> tuple[list[str], list[str] | None]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    texts = (line.decode("utf-8", "replace") for line in lines)
    try:
        records = [*islice(filter(any, csv.reader(texts, delimiter=delimiter)), 2)]
    except csv.Error:
        return [], None
    return (records[0] if records else []), (records[1] if len(records) > 1 else None)


def _advance(reader: Iterator[list[str]]) -> bool:
    """Read one record; False at the end. A malformed record is refused when it is parsed."""
    try:
        return next(reader, None) is not None
    except csv.Error:
        return True


def _cell(text: str) -> Any:
    if text == "":
        return None
    return math.nan if text.lower() == "nan" else text
