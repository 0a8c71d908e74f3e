"""Text files of rows: JSON Lines, JSON, CSV and TSV.

Text files are not read with `datasets`, which refuses a whole file for one malformed row and gives all rows
one type. Here every row is parsed, and fails, on its own.
"""

from __future__ import annotations

import csv
import io
import json
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flamingo_ft.data.fields import type_name
from flamingo_ft.data.files import MappedFile, skip_bom
from flamingo_ft.data.schemas.columns import normalize_name
from flamingo_ft.data.schemas.schema import all_fields
from flamingo_ft.errors import UserError

CHUNK_BYTES = 1 << 22
WHITESPACE = b" \t\r\n\v\f"
EXPECTED_JSON = "a list of rows"
ROWS_KEY = "data"  # key under which a JSON object may hold its rows
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
USUAL_DELIMITER = {".csv": ",", ".tsv": "\t"}
HEAD_LINES = 64  # read to find the delimiter: the file's name does not always say it
SEP_LINE = re.compile(rb'"?sep=([,;\t])"?\r?\n')  # Excel writes it before the header
WELL_FORMED = "close every quote and end lines with a line feed"
# csv allows 131,072 characters by default; an image as base64 is longer.
MAX_FIELD_CHARACTERS = (1 << 31) - 1


class TextRows:
    """Base of text files whose rows are byte ranges.

    With ``indexed``, the offset of each row is held in memory, 8 bytes per row.
    """

    def __init__(self, path: Path, indexed: bool):
        self.name = str(path)
        self.indexed = indexed
        self._file = MappedFile(path)
        self._begin = skip_bom(path)
        self._starts = self._index() if indexed else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, key: str) -> None:
        return None

    def _index(self) -> np.ndarray:
        """Return the byte offsets (N,) at which rows start."""
        raise NotImplementedError


class JsonLines(TextRows):
    """One JSON value per line; blank lines are not rows."""

    def content(self, row: int) -> bytes:
        return _line(self._file.view(), int(self._starts[row]))

    def stream(self) -> Iterator[bytes]:
        with open(self.name, "rb") as file:
            file.seek(self._begin)
            yield from (line for line in file if line.strip(WHITESPACE))

    def parse(self, content: bytes, where: str) -> Any:
        return parse_json(decode_utf8(content, where), where, "one object a line")

    def _index(self) -> np.ndarray:
        starts = np.concatenate([[self._begin], *self._after_newlines()]).astype(np.int64)
        starts = starts[(starts >= self._begin) & (starts < self._file.size)]
        view = self._file.view()
        first = np.frombuffer(view, np.uint8)[starts] if len(starts) else np.empty(0, np.uint8)
        candidates = np.flatnonzero(np.isin(first, np.frombuffer(WHITESPACE, np.uint8)))
        blank = [i for i in candidates if not _line(view, int(starts[i])).strip(WHITESPACE)]
        return np.delete(starts, blank)

    def _after_newlines(self) -> Iterator[np.ndarray]:
        with open(self.name, "rb") as file:
            offset = 0
            while chunk := file.read(CHUNK_BYTES):
                yield np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset + 1
                offset += len(chunk)


class JsonRows:
    """Rows of a JSON file, parsed as a whole once in each process that reads it.

    The file is a list, an object with one list in it (`{"data": [...]}`), or an object with `data: {key:
    row}`, whose rows get their key as ``id``.
    """

    def __init__(self, path: Path, indexed: bool):
        self.name = str(path)
        self.indexed = indexed
        self._file = MappedFile(path)
        self._rows: list[Any] | None = None
        self._row_of_id: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._loaded())

    def content(self, row: int) -> Any:
        return self._loaded()[row]

    def stream(self) -> Iterator[Any]:
        yield from self._loaded()

    def parse(self, content: Any, where: str) -> Any:
        return content

    def find(self, key: str) -> Mapping[str, Any] | None:
        if self._row_of_id is None:
            rows = enumerate(self._loaded())
            self._row_of_id = {
                str(row["id"]): i for i, row in rows if isinstance(row, Mapping) and "id" in row
            }
        row = self._row_of_id.get(key)
        return None if row is None else self._loaded()[row]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_row_of_id": None}

    def _loaded(self) -> list[Any]:
        if self._rows is None:
            content = self._file.view()[skip_bom(self._file.path) :]
            expected = f"{EXPECTED_JSON} (one object a line belongs in a .jsonl file)"
            self._rows = _rows_in(parse_json(decode_utf8(content, self.name), self.name, expected), self.name)
        return self._rows


def parse_json(text: str, where: str, expected: str) -> Any:
    """Parse JSON. Raises UserError, beginning with ``where``, for other text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or deep nesting
        reason = str(error).splitlines()[0]
    raise UserError(f"{where}: not JSON ({reason}); expected {expected}")


def decode_utf8(content: bytes, where: str, encoding: str = "utf-8") -> str:
    """Decode text. Raises UserError, beginning with ``where``, for bytes that are not UTF-8."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _line(view: mmap.mmap | bytes, start: int) -> bytes:
    end = view.find(b"\n", start)
    return view[start : len(view) if end < 0 else end]


def _rows_in(value: Any, name: str) -> list[Any]:
    if isinstance(value, Mapping):
        rows = value.get(ROWS_KEY)
        if isinstance(rows, Mapping):
            return [{"id": key, **row} if isinstance(row, Mapping) else row for key, row in rows.items()]
        lists = [inside for inside in value.values() if isinstance(inside, list)]
        value = lists[0] if len(lists) == 1 else value.get(ROWS_KEY, value)
    if not isinstance(value, list):
        raise UserError(f"{name}: expected {EXPECTED_JSON}, got {type_name(value)}")
    return value


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
        """Yield each record that is not blank and its byte offset; quoted line breaks do not end a record."""
        csv.field_size_limit(MAX_FIELD_CHARACTERS)
        with open(self.name, "rb") as file:
            file.seek(self._header)
            lines: list[bytes] = []

            def texts() -> Iterator[str]:
                # Only the ends of records matter here, and Latin-1 decodes any byte; parse() requires UTF-8.
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
