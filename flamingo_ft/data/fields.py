"""Reading the fields of a row, with their types checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from flamingo_ft.errors import UserError

Row = Mapping[str, Any]

TAR_MEMBERS = "__members__"
"""Key under which a row from a tar keeps the content of its files, by name."""

_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "text",
    bytes: "bytes",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


def type_name(value: Any) -> str:
    """Return the type of a value as error messages call it, mostly in JSON's terms."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN (an empty cell)"
    return "null (no value)" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def has_value(row: Row, name: str) -> bool:
    """Whether a row has a value in a field. Null, and NaN (an empty cell of a table), are not values."""
    value = row.get(name)
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Whether a value is null, NaN, whitespace, or an image of `datasets` with neither bytes nor path."""
    if isinstance(value, str):  # first: most values are text
        return not value.strip()
    if isinstance(value, Mapping):
        return bool(value) and {*value} <= {"bytes", "path"} and all(map(is_blank, value.values()))
    return value is None or (isinstance(value, float) and math.isnan(value))


def has_content(value: Any) -> bool:
    """Whether a value holds anything, however deeply nested; Arrow fills absent objects with nulls."""
    if value is None or isinstance(value, str):  # first: most values are text
        return not is_blank(value)
    if isinstance(value, Mapping):
        return any(map(has_content, value.values()))
    return any(map(has_content, value)) if isinstance(value, (list, tuple)) else not is_blank(value)


def texts_in(value: Any) -> Iterator[str]:
    """Yield the non-empty strings in a value, however deeply nested."""
    if isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, (Mapping, list, tuple)):
        for inside in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(inside)


def text_field(row: Row, name: str, where: str) -> str:
    """Return a field of text, which may be empty."""
    if not isinstance(row.get(name), str):
        raise UserError(f"{where}: {name}: {_mismatch(row, name, 'text')}")
    return check_unicode(row[name], f"{where}: {name}")


def bool_field(row: Row, name: str, where: str) -> bool:
    """Return a field that is true or false; tables also have 1 and 0, or either as text."""
    value = row.get(name)
    written = value.strip().lower() if isinstance(value, str) else value
    if written in ("true", "1", 1):  # True equals 1
        return True
    if written in ("false", "0", 0):
        return False
    raise UserError(f"{where}: {name}: {_mismatch(row, name, 'true or false')}")


def optional_text(row: Row, name: str, where: str) -> str | None:
    """Return a field of text; None if it is missing or blank."""
    text = text_field(row, name, where) if has_value(row, name) else ""
    return text if text.strip() else None


def list_field(row: Row, name: str, where: str) -> list:
    """Return a field that is a list, or, as in tables, the JSON text of one."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
    if not isinstance(value, list):
        raise UserError(f"{where}: {name}: {_mismatch(row, name, 'a list')}")
    return value


def nonempty_text(value: Any, where: str) -> str:
    """Return text that is not blank; a number becomes its text.

    Raises UserError for null, NaN and blank text.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, got {type_name(value)}")
    if not value.strip():
        raise UserError(f"{where}: empty; write text or remove the row")
    return check_unicode(value, where)


def nonempty_text_field(row: Row, name: str, where: str) -> str:
    """Return a field of text that is not blank."""
    if name not in row:
        raise UserError(f"{where}: {name}: {_mismatch(row, name, 'text')}")
    return nonempty_text(row[name], f"{where}: {name}")


def usable_texts(values: Iterable[Any]) -> list[str]:
    """Return the values that `nonempty_text` accepts, as text."""
    texts = []
    for value in values:
        with suppress(UserError):
            texts.append(nonempty_text(value, ""))
    return texts


def check_unicode(text: str, where: str) -> str:
    """Return the text.

    Raises UserError for an unpaired surrogate (from a JSON escape), which no tokenizer accepts.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half a character (an unpaired surrogate) at position {error.start}; remove it"
        ) from None
    return text


def _mismatch(row: Row, name: str, expected: str) -> str:
    return (
        f"expected {expected}, got {type_name(row[name])}" if name in row else f"missing; expected {expected}"
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
