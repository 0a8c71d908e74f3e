"""JSONL, CSV and TSV: files of text in which every row stands by itself, and fails by itself.

Not read through `datasets`, which refuses a whole file for one malformed row and makes the types of all rows one.


A JSON file that is one list of rows, or an object around such a list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flamingo_ft.data.fields import type_name
from flamingo_ft.data.files import MappedFile, skip_bom
from flamingo_ft.errors import UserError

CHUNK_BYTES = 1 << 22
WHITESPACE = b" \t\r\n\v\f"


class TextRows:
    """Rows that are stretches of a text file; ``indexed`` ones are found by the bytes they start at, 8 bytes a row."""

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


WANTED = "a list of rows"
HOLDER = "data"  # under which an object may keep its rows


class JsonRows:
    """Rows of a JSON file, parsed once in each process that reads them: JSON cannot be entered in its middle.

    A list, an object with one list in it (`{"data": [...]}`), or an object with `data: {key: row}`, whose rows get
    their key as ``id``.
    """

    def __init__(self, path: Path, indexed: bool):
        self.name = str(path)
        self.indexed = indexed
        self._file = MappedFile(path)
        self._rows: list[Any] | None = None
        self._numbers: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._loaded())

    def content(self, row: int) -> Any:
        return self._loaded()[row]

    def stream(self) -> Iterator[Any]:
        yield from self._loaded()

    def parse(self, content: Any, where: str) -> Any:
        return content

    def find(self, key: str) -> Mapping[str, Any] | None:
        if self._numbers is None:
            rows = enumerate(self._loaded())
            self._numbers = {str(row["id"]): i for i, row in rows if isinstance(row, Mapping) and "id" in row}
        number = self._numbers.get(key)
        return None if number is None else self._loaded()[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_numbers": None}

    def _loaded(self) -> list[Any]:
        if self._rows is None:
            self._rows = _rows_in(self._parsed(), self.name)
        return self._rows

    def _parsed(self) -> Any:
        content = self._file.view()[skip_bom(self._file.path) :]
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
        return parse_json(text, self.name, f"{WANTED} (one object a line belongs in a .jsonl file)")


def _rows_in(value: Any, name: str) -> list[Any]:
    if isinstance(value, Mapping):
        if isinstance(value.get(HOLDER), Mapping):
            return [
                {"id": key, **row} if isinstance(row, Mapping) else row for key, row in value[HOLDER].items()
            ]
        lists = [inside for inside in value.values() if isinstance(inside, list)]
        value = lists[0] if len(lists) == 1 else value.get(HOLDER, value)
    if not isinstance(value, list):
        raise UserError(f"{name}: found {type_name(value)}, wanted {WANTED}")
    return value
