"""What separates the cells of a .csv or .tsv file: not always what its name says."""

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
from flamingo_ft.data.schemas.reader import ALL_FIELDS
from flamingo_ft.errors import UserError

from .text_rows import WHITESPACE, TextRows, _decode

DELIMITERS = (",", ";", "\t")
USUAL = {".csv": ",", ".tsv": "\t"}
HEAD_LINES = 64
SEP_LINE = re.compile(rb'"?sep=([,;\t])"?\r?\n')  # Excel writes it before the header


class Dialect(NamedTuple):
    """delimiter: between cells. begin: the byte at which the header starts."""

    delimiter: str
    begin: int


def dialect_of(path: Path, begin: int) -> Dialect:
    """The delimiter that the file itself states, or that makes most of its header.

    Most: more names of known fields; if equal, a header of as many cells as the first row has; if equal, more cells.
    A header that no delimiter divides is one column. Delimiters in quotes do not count.
    """
    with open(path, "rb") as file:
        file.seek(begin)
        lines = [*islice(file, HEAD_LINES)]
    stated = SEP_LINE.fullmatch(lines[0]) if lines else None
    if stated:
        return Dialect(stated[1].decode(), begin + len(lines[0]))
    usual = USUAL[path.suffix.lower()]
    candidates = (usual, *(delimiter for delimiter in DELIMITERS if delimiter != usual))
    return Dialect(max(candidates, key=lambda delimiter: _fit(lines, delimiter)), begin)


def _fit(lines: list[bytes], delimiter: str) -> tuple[int, bool, int]:
    """How well a delimiter fits the first lines; the first of equal ones is taken."""
    header, first = _first_records(lines, delimiter)
    if len(header) < 2:
        return 0, False, 0
    known = sum(normalize_name(name) in ALL_FIELDS for name in header)
    return known, first is None or len(first) == len(header), len(header)


def _first_records(lines: list[bytes], delimiter: str) -> tuple[list[str], list[str] | None]:
    texts = (line.decode("utf-8", "replace") for line in lines)
    try:
        records = [*islice(filter(any, csv.reader(texts, delimiter=delimiter)), 2)]
    except csv.Error:
        return [], None
    return (records[0] if records else []), (records[1] if len(records) > 1 else None)


NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


WELL_FORMED = "close every quote and end lines with a line feed"


LONGEST_FIELD = (
    1 << 31
) - 1  # an image as base64 is longer than the 131,072 characters that csv allows by itself


class DelimitedRows(TextRows):
    """Text with a header, its cells separated by commas, semicolons or tabs.

    An empty cell is null, and `nan` is what pandas wrote for a number it had not.
    """

    def __init__(self, path: Path, indexed: bool):
        csv.field_size_limit(LONGEST_FIELD)
        self._delimiter, self._header = dialect_of(path, skip_bom(path))
        super().__init__(path, indexed)
        header = next(self._records(), (0, b""))[1]
        self._columns = self._cells(_decode(header, str(path)), str(path)) if header.strip() else []
        if len({*self._columns}) != len(self._columns):
            raise UserError(f"{path}: found columns of the same name in the first line; name each once")

    def content(self, row: int) -> bytes:
        end = int(self._starts[row + 1]) if row + 1 < len(self._starts) else self._file.size
        return self._file.view()[int(self._starts[row]) : end]

    def stream(self) -> Iterator[bytes]:
        yield from (content for index, (_, content) in enumerate(self._records()) if index)

    def parse(self, content: bytes, where: str) -> Mapping[str, Any]:
        cells = self._cells(_decode(content, where), where)
        if len(cells) != len(self._columns):
            wanted = f"{len(self._columns)} ({', '.join(self._columns)})"
            remedy = f"put text with {NAMES[self._delimiter]} in quotes"
            raise UserError(f"{where}: found {len(cells)} cells, wanted {wanted}; {remedy}")
        return {name: _cell(cell) for name, cell in zip(self._columns, cells, strict=True)}

    def _index(self) -> np.ndarray:
        return np.fromiter((start for start, _ in self._records()), np.int64)[1:]

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """Each record but blank ones, and the byte it starts at; it has several lines where line breaks are quoted."""
        csv.field_size_limit(LONGEST_FIELD)
        with open(self.name, "rb") as file:
            file.seek(self._header)
            lines: list[bytes] = []
            # Only where a record ends is asked here, so bytes that are not UTF-8 may pass: parsing refuses them.
            texts = (lines.append(line) or line.decode("latin-1") for line in file)
            start, reader = self._header, csv.reader(texts, delimiter=self._delimiter)
            while _advance(reader):
                record = b"".join(lines)
                if record.strip(WHITESPACE):
                    yield start, record
                start += len(record)
                lines.clear()

    def _cells(self, text: str, where: str) -> list[str]:
        csv.field_size_limit(
            LONGEST_FIELD
        )  # a setting of the process, and this may be another than the index's
        try:
            lines = io.StringIO(text, newline="\n")
            return next(csv.reader(lines, delimiter=self._delimiter, strict=True), [])
        except csv.Error as error:
            raise UserError(
                f"{where}: not {self._delimiter!r}-separated text ({error}); {WELL_FORMED}"
            ) from None


def _advance(reader: Iterator[list[str]]) -> bool:
    """Read one record on; False at the end. A malformed one is refused when it is parsed."""
    try:
        return next(reader, None) is not None
    except csv.Error:
        return True


def _cell(text: str) -> Any:
    return None if text == "" else math.nan if text.lower() == "nan" else text
