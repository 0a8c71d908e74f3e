"""A row's fields, with their types checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flamingo_ft.errors import UserError

Row = Mapping[str, Any]

TAR_MEMBERS = "__members__"
"""Where a row out of a tar keeps the content of its files, by name."""

_NAMES = {
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
    """What a value is, in a user's words."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN (an empty cell)"
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def has_value(row: Row, name: str) -> bool:
    """Whether a row has something in a field. Tables put null or NaN where they have nothing."""
    value = row.get(name)
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Whether a value stands for nothing: null, NaN, white space, or an image of `datasets` without bytes and path."""
    if isinstance(value, str):  # first, as most values are
        return not value.strip()
    if isinstance(value, Mapping):
        return bool(value) and {*value} <= {"bytes", "path"} and all(map(is_blank, value.values()))
    return value is None or (isinstance(value, float) and math.isnan(value))


def has_content(value: Any) -> bool:
    """Whether there is anything in a value, however deeply nested; Arrow fills absent objects with nulls."""
    if value is None or isinstance(value, str):  # first, as most values are
        return not is_blank(value)
    if isinstance(value, Mapping):
        return any(map(has_content, value.values()))
    return any(map(has_content, value)) if isinstance(value, (list, tuple)) else not is_blank(value)


def texts_in(value: Any) -> Iterator[str]:
    """The non-empty strings in a value, however deeply nested."""
    if isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, (Mapping, list, tuple)):
        for inside in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(inside)


def text_field(row: Row, name: str, where: str) -> str:
    if not isinstance(row.get(name), str):
        raise UserError(f"{where}: {name}: found {_found(row, name)}, wanted text")
    return check_unicode(row[name], f"{where}: {name}")


def optional_text(row: Row, name: str, where: str) -> str | None:
    """None where there is nothing, or no words."""
    text = text_field(row, name, where) if has_value(row, name) else ""
    return text if text.strip() else None


def list_field(row: Row, name: str, where: str) -> list:
    """A list, which tables have as JSON text."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
    if not isinstance(value, list):
        raise UserError(f"{where}: {name}: found {_found(row, name)}, wanted a list")
    return value


def nonempty_text(value: Any, where: str) -> str:
    """Text that says something; a number is taken for what is written. UserError for null, NaN and empty text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: found {type_name(value)}, wanted text")
    if not value.strip():
        raise UserError(f"{where}: found no words, wanted text; write it or remove the row")
    return check_unicode(value, where)


def nonempty_text_field(row: Row, name: str, where: str) -> str:
    if name not in row:
        raise UserError(f"{where}: {name}: found no such field, wanted text")
    return nonempty_text(row[name], f"{where}: {name}")


def check_unicode(text: str, where: str) -> str:
    """The text, refused where JSON escapes made half a character of it, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: found half a character at {error.start}, wanted whole text; remove it"
        ) from None
    return text


def _found(row: Row, name: str) -> str:
    return type_name(row[name]) if name in row else "no such field"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
