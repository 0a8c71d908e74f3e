"""The registered schemas by name, and how a row's schema is recognized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flamingo_ft.config.tables import DATASET_FORMATS
from flamingo_ft.data.fields import TAR_MEMBERS, Row, type_name
from flamingo_ft.errors import UserError

from .schema import MEDIA_FIELDS, Schema

COMMON_FIELDS = (*MEDIA_FIELDS, "task")  # read whatever the schema

SCHEMAS: dict[str, Schema] = {}


def register_schema(schema: Schema, description: str | None = None) -> Schema:
    """Make a schema known to recipes (``format``), to recognition and to reading.

    Args:
        description: the columns it is recognized by, for error messages; needed for schemas outside this
            package, which are not named in ``config/tables.py``. Such a schema is tried after the others.
    """
    if description is not None:
        DATASET_FORMATS[schema.name] = description
    if schema.name not in DATASET_FORMATS:
        raise ValueError(
            f"schema {schema.name}: not in config/tables.py; add it there, or pass a description"
        )
    SCHEMAS[schema.name] = schema
    return schema


def all_fields() -> frozenset[str]:
    """Return every column name that some schema reads."""
    return frozenset((*COMMON_FIELDS, *(name for schema in SCHEMAS.values() for name in schema.fields)))


def all_options() -> frozenset[str]:
    """Return every key of ``columns`` that is a setting of some schema."""
    return frozenset(name for schema in SCHEMAS.values() for name in schema.options)


def detect_schema(row: Any, where: str) -> str:
    """Return the name of the first schema that the row's columns match.

    Raises UserError listing the columns of the row and of every schema.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object, got {type_name(row)}")
    name = next((name for name in DATASET_FORMATS if name in SCHEMAS and SCHEMAS[name].matches(row)), None)
    if name is None:
        columns = ", ".join(column for column in row if column != TAR_MEMBERS) or "none"
        known = "; ".join(f"{name} ({description})" for name, description in DATASET_FORMATS.items())
        raise UserError(
            f"{where}: no format has these columns, got {columns}; name them with columns and format, "
            f"or provide those of {known}"
        )
    return name


def check_columns(columns: Mapping[str, str], name: str, where: str) -> None:
    """Raise UserError for a ``columns`` entry that is not a field of schema ``name``."""
    schema = SCHEMAS[name]
    known = {*schema.fields, *schema.options, *(COMMON_FIELDS if schema.reads_media else ("task",))}
    unknown = next((field for field in columns if field not in known), None)
    if unknown is not None:
        raise UserError(
            f"{where}: columns: expected fields of {name}, got {unknown!r}; use {', '.join(sorted(known))}"
        )


def described_columns(name: str) -> str:
    """Return the columns that schema ``name`` is recognized by, in words."""
    return DATASET_FORMATS[name]


def row_with_fields(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row with each field also under its own name. columns: the column of each field."""
    return {**row, **{field: row[column] for field, column in columns.items()}}
