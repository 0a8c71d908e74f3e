"""Rows of one source to samples, by the schema that the recipe names or the first row fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flamingo_ft.data.fields import MEMBERS, Row, kind, optional_text
from flamingo_ft.data.locate import Locator
from flamingo_ft.data.sample import Sample
from flamingo_ft.errors import UserError

from .compose import compose
from .mimicit import IMAGES_FILE, ImagesById, images_file, read_mimicit
from .table import MIMICIT, SCHEMAS, check_columns, recognise

Find = Callable[[str], Row | None]


class RowReader:
    """Reads rows of one schema. ``columns`` says under which names its fields stand."""

    def __init__(self, schema: str, columns: Mapping[str, str], locator: Locator, where: str):
        check_columns(columns, schema, where)
        self.schema = schema
        self._columns = {field: column for field, column in columns.items() if field != IMAGES_FILE}
        self._images_file = columns.get(IMAGES_FILE)
        self._locator = locator
        self._images: dict[str, ImagesById] = {}

    def read(self, row: Any, where: str, file: str, find: Find) -> Sample:
        """The sample of a parsed row of ``file``; ``find`` gives other rows of that file by their id."""
        row = renamed(row, self._columns, where, SCHEMAS[self.schema].wants)
        task = optional_text(row, "task", where)
        if self.schema == MIMICIT:
            draft = read_mimicit(row, where, lambda key: self._other(find(key), where), self._images_of(file))
        else:
            draft = SCHEMAS[self.schema].read(row, where)
        return compose(draft, task, where, self._locator)

    def _other(self, row: Row | None, where: str) -> Row | None:
        return None if row is None else renamed(row, self._columns, where, SCHEMAS[self.schema].wants)

    def _images_of(self, file: str) -> ImagesById:
        if file not in self._images:
            root = self._locator.root or Path()
            self._images[file] = ImagesById(images_file(Path(file), self._images_file, root))
        return self._images[file]


def renamed(row: Any, columns: Mapping[str, str], where: str, wants: str) -> Row:
    """The row with its columns under the names of the fields. UserError for what is no row, or lacks a column."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: found {kind(row)}, wanted an object with {wants}")
    for field, column in columns.items():
        if column not in row:
            found = ", ".join(name for name in row if name != MEMBERS)
            raise UserError(f"{where}: columns: {field}: found no column {column!r}, wanted one of {found}")
    return {**row, **{field: row[column] for field, column in columns.items()}}


def schema_of(row: Any, columns: Mapping[str, str], where: str) -> str:
    """The schema that a row fits, once its columns have the names of fields."""
    mapped = {field: column for field, column in columns.items() if field != IMAGES_FILE}
    return recognise(renamed(row, mapped, where, "columns"), where)
