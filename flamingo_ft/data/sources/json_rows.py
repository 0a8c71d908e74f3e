"""A JSON file that is one list of rows, or an object around such a list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flamingo_ft.data.fields import kind
from flamingo_ft.data.mapped_file import MappedFile, text_start
from flamingo_ft.errors import UserError

from .text_rows import parse_json

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
        content = self._file.view()[text_start(self._file.path) :]
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
        raise UserError(f"{name}: found {kind(value)}, wanted {WANTED}")
    return value
