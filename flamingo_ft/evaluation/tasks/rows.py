"""Rows of published annotation files, with the types of their fields checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo_ft.data.fields import check_unicode, list_field, text_field, type_name
from flamingo_ft.data.sources.text_rows import decode_utf8, parse_json
from flamingo_ft.errors import UserError

UTF8 = "utf-8-sig"  # with or without a byte order mark


@dataclass(frozen=True, slots=True)
class Row:
    """An object in an annotation file, or the whole file.

    where: file and row. source: URL of the description of the format. Methods raise UserError, naming both,
    for a field that is missing or of another type.
    """

    value: Mapping[str, Any]
    where: str
    source: str

    def text(self, name: str) -> str:
        """Return a field of text, which may be empty."""
        try:
            return text_field(self.value, name, self.where)
        except UserError as error:
            raise self._with_remedy(str(error)) from None

    def integer(self, name: str) -> int:
        """Return a field that is a whole number."""
        value = self.value.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            found = f"expected a whole number, got {type_name(value)}" if name in self.value else "missing"
            raise self.error(f"{name}: {found}")
        return value

    def texts(self, name: str, key: str | None = None) -> tuple[str, ...]:
        """Return a field that is a list of texts, at least one. key: they are objects with the text there."""
        texts = []
        for index, value in enumerate(self.listed(name)):
            text = value
            if key is not None:
                text = value.get(key) if isinstance(value, Mapping) else None
            if not isinstance(text, str):
                expected = "text" if key is None else f"an object with the text {key!r}"
                raise self.error(f"{name}[{index}]: expected {expected}, got {type_name(value)}")
            if not text.isascii():
                check_unicode(text, f"{self.where}: {name}[{index}]")
            texts.append(text)
        return tuple(texts)

    def row(self, name: str) -> Row:
        """Return a field that is an object."""
        return as_row(self.value.get(name), f"{self.where}: {name}", self.source)

    def listed(self, name: str) -> list[Any]:
        """Return a field that is a list of at least one value."""
        try:
            values = list_field(self.value, name, self.where)
        except UserError as error:
            raise self._with_remedy(str(error)) from None
        if not values:
            raise self.error(f"{name}: expected at least one, got an empty list")
        return values

    def error(self, problem: str) -> UserError:
        """Return the error for a row that has a problem."""
        return self._with_remedy(f"{self.where}: {problem}")

    def _with_remedy(self, problem: str) -> UserError:
        return UserError(f"{problem}; give a file as {self.source} describes it")


def as_row(value: Any, where: str, source: str) -> Row:
    """Return a parsed object as a row. Raises UserError for another type."""
    if not isinstance(value, Mapping):
        raise Row({}, where, source).error(f"expected an object, got {type_name(value)}")
    return Row(value, where, source)


def read_text(path: Path) -> str:
    """Return the text of a file. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        return decode_utf8(path.read_bytes(), str(path), UTF8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None


def read_json(path: Path, source: str) -> Any:
    """Return the value of a JSON file. Raises UserError if it is not JSON."""
    return parse_json(read_text(path), str(path), f"the file that {source} describes")


def rows_under(path: Path, key: str, source: str) -> list[Row]:
    """Return the rows of a JSON file that is an object with the list of them under ``key``.

    Raises UserError for a file of another format.
    """
    values = as_row(read_json(path, source), str(path), source).listed(key)
    return _numbered(values, path, source)


def rows_in_list(path: Path, source: str) -> list[Row]:
    """Return the rows of a JSON file that is a list of them. Raises UserError for another format."""
    values = read_json(path, source)
    if not isinstance(values, list):
        raise Row({}, str(path), source).error(f"expected a list, got {type_name(values)}")
    return _numbered(values, path, source)


def rows_by_key(path: Path, source: str) -> dict[str, Row]:
    """Return the rows of a JSON file that is an object of them. Raises UserError for another format."""
    whole = as_row(read_json(path, source), str(path), source)
    return {key: as_row(value, f"{path}: row {key!r}", source) for key, value in whole.value.items()}


def rows_in_lines(path: Path, source: str) -> list[Row]:
    """Return the rows of a file with an object in each line. Raises UserError for another format."""
    rows = []
    for line in filter(str.strip, read_text(path).split("\n")):
        where = f"{path}: row {len(rows)}"
        rows.append(as_row(parse_json(line, where, "an object in each line"), where, source))
    return rows


def _numbered(values: Sequence[Any], path: Path, source: str) -> list[Row]:
    return [as_row(value, f"{path}: row {number}", source) for number, value in enumerate(values)]
