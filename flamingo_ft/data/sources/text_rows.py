"""JSONL, CSV and TSV: files of text in which every row stands by itself, and fails by itself.

Not read through `datasets`, which refuses a whole file for one malformed row and makes the types of all rows one.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flamingo_ft.data.mapped_file import MappedFile, text_start
from flamingo_ft.errors import UserError

from .dialect import dialect_of

CHUNK_BYTES = 1 << 22
WHITESPACE = b" \t\r\n\v\f"
NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
WELL_FORMED = "close every quote and end lines with a line feed"
LONGEST_FIELD = (
    1 << 31
) - 1  # an image as base64 is longer than the 131,072 characters that csv allows by itself


class TextRows:
    """Rows that are stretches of a text file; ``indexed`` ones are found by the bytes they start at, 8 bytes a row."""

    def __init__(self, path: Path, indexed: bool):
        self.name = str(path)
        self.indexed = indexed
        self._file = MappedFile(path)
        self._begin = text_start(path)
        self._starts = self._index() if indexed else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, key: str) -> None:
        return None

    def _index(self) -> np.ndarray:
        """The bytes (N,) at which rows start."""
        raise NotImplementedError


class JsonLines(TextRows):
    """One JSON value a line; blank lines are not rows."""

    def content(self, row: int) -> bytes:
        view, start = self._file.view(), int(self._starts[row])
        end = view.find(b"\n", start)
        return view[start : len(view) if end < 0 else end]

    def stream(self) -> Iterator[bytes]:
        with open(self.name, "rb") as file:
            file.seek(self._begin)
            yield from (line for line in file if line.strip(WHITESPACE))

    def parse(self, content: bytes, where: str) -> Any:
        return parse_json(_decode(content, where), where, "one object a line")

    def _index(self) -> np.ndarray:
        starts = np.concatenate([[self._begin], *self._after_newlines()]).astype(np.int64)
        starts = starts[(starts >= self._begin) & (starts < self._file.size)]
        view = self._file.view()
        first = np.frombuffer(view, np.uint8)[starts] if len(starts) else np.empty(0, np.uint8)
        doubtful = np.flatnonzero(np.isin(first, np.frombuffer(WHITESPACE, np.uint8)))
        blank = [i for i in doubtful if not self._line(view, int(starts[i])).strip(WHITESPACE)]
        return np.delete(starts, blank)

    def _after_newlines(self) -> Iterator[np.ndarray]:
        with open(self.name, "rb") as file:
            offset = 0
            while chunk := file.read(CHUNK_BYTES):
                yield np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset + 1
                offset += len(chunk)

    @staticmethod
    def _line(view: Any, start: int) -> bytes:
        end = view.find(b"\n", start)
        return view[start : len(view) if end < 0 else end]


class DelimitedRows(TextRows):
    """Text with a header, its cells separated by commas, semicolons or tabs.

    An empty cell is null, and `nan` is what pandas wrote for a number it had not.
    """

    def __init__(self, path: Path, indexed: bool):
        csv.field_size_limit(LONGEST_FIELD)
        self._delimiter, self._header = dialect_of(path, text_start(path))
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


def parse_json(text: str, where: str, wanted: str) -> Any:
    """JSON text to a value. UserError, beginning with ``where``, when it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        reason = str(error).splitlines()[0]
    raise UserError(f"{where}: not JSON ({reason}); wanted {wanted}")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _advance(reader: Iterator[list[str]]) -> bool:
    """Read one record on; False at the end. A malformed one is refused when it is parsed."""
    try:
        return next(reader, None) is not None
    except csv.Error:
        return True


def _cell(text: str) -> Any:
    return None if text == "" else math.nan if text.lower() == "nan" else text
