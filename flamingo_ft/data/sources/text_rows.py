"""JSON Lines and JSON files.

Text files are not read with `datasets`, which refuses a whole file for one malformed row and gives all rows
one type. Here every row is parsed, and fails, on its own.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flamingo_ft.data.fields import type_name
from flamingo_ft.data.files import MappedFile, skip_bom
from flamingo_ft.errors import UserError

CHUNK_BYTES = 1 << 22
WHITESPACE = b" \t\r\n\v\f"
EXPECTED_JSON = "a list of rows"
ROWS_KEY = "data"  # key under which a JSON object may hold its rows


class TextRows:
    """Base of text files whose rows are byte ranges; with ``indexed``, 8 bytes of memory per row hold
    where each starts."""

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
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number with thousands of digits, or brackets nested as deep
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
