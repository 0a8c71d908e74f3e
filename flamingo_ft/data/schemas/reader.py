"""Reads rows of one source into samples, by the schema that the recipe names or the first row matches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flamingo_ft.data.fields import Row, optional_text, type_name
from flamingo_ft.data.media_resolver import MediaResolver
from flamingo_ft.data.sample import Sample
from flamingo_ft.errors import UserError

from .boxes import BoxUnit, boxes_of
from .build_sample import build_sample
from .columns import (
    find_columns,
    image_column,
    normalize_name,
    refuse_unsupported,
    task_column,
    text_columns,
    unread_columns,
)
from .schema import (
    COMMON_FIELDS,
    SCHEMAS,
    DataFile,
    RowParser,
    Schema,
    all_fields,
    all_options,
    check_columns,
    described_columns,
    detect_schema,
    row_with_fields,
)

FindRow = Callable[[str], Row | None]
CAPTION = "caption"
QUESTIONS = ("question", "query", "prompt", "instruction")  # columns that a caption may be the answer to


class RowReader:
    """Reads rows of one schema.

    Args:
        columns: the column of each field that has another name, and the schema's options.
        where: the source, for error messages.
        detected: whether the schema was recognized from the columns, not named by the recipe. Then a row is
            refused if a column that looks like part of its task is not read.
        box_unit: of the numbers in ``boxes``.
    """

    def __init__(
        self,
        schema: str,
        columns: Mapping[str, str],
        resolver: MediaResolver,
        where: str,
        detected: bool = False,
        box_unit: BoxUnit = "pixels",
    ):
        check_columns(columns, schema, where)
        self.schema = schema
        self._options = {name: columns[name] for name in self._schema.options if name in columns}
        self._columns = {name: column for name, column in columns.items() if name not in self._options}
        self._resolver = resolver
        self._detected = detected
        self._box_unit: BoxUnit = box_unit
        self._parsers: dict[str, RowParser] = {}  # by file
        self._last_names: tuple[str, ...] | None = None
        self._last_columns: dict[str, str] = {}

    @property
    def _schema(self) -> Schema:
        return SCHEMAS[self.schema]  # not an attribute: its functions may not be picklable

    def read(self, row: Any, where: str, file: str, find: FindRow) -> Sample:
        """Return the sample of a parsed row of ``file``. find: returns another row of that file by its id."""
        columns = self._columns_of(row, where)
        unread = self._unread(row, columns, where)
        row = row_with_fields(row, columns)
        task = optional_text(row, "task", where)
        parsed = self._parser(file, find)(row, where)
        boxes = boxes_of(row, self._box_unit, where)
        sample = build_sample(parsed, task, where, self._resolver, boxes)
        if self._detected and not sample.images:
            self._refuse_column(image_column(unread), unread, columns, "the image", where)
        names = (*text_columns(unread), *parsed.unread)
        return replace(sample, unread=names) if names else sample

    def unread(self, row: Any, where: str) -> tuple[str, ...]:
        """Return the columns of text that the schema does not read.

        Raises UserError if the schema was detected and one of them looks like part of the task.
        """
        try:
            return tuple(text_columns(self._unread(row, self._columns_of(row, where), where)))
        except UserError:
            if self._detected:
                raise
            return ()  # the row is refused when it is read

    def _parser(self, file: str, find: FindRow) -> RowParser:
        if file not in self._parsers:

            def find_with_fields(key: str) -> Row | None:
                row = find(key)
                return (
                    None
                    if row is None
                    else row_with_fields(row, self._columns_of(row, f"{file}: row {key!r}"))
                )

            root = self._resolver.root or Path()
            self._parsers[file] = self._schema.parser(
                DataFile(Path(file), root, self._options, find_with_fields)
            )
        return self._parsers[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parsers": {}}

    def _columns_of(self, row: Any, where: str) -> dict[str, str]:
        """Return the column of each field.

        Raises UserError for a row that is not an object, or lacks a column.
        """
        names = tuple(_object(row, where, described_columns(self._schema.name)))
        if names != self._last_names:  # most rows have the columns of the row before
            fields = (*self._schema.fields, *COMMON_FIELDS)
            self._last_columns = find_columns(row, self._columns, fields, where)
            self._last_names = names
        return self._last_columns

    def _unread(self, row: Row, columns: Mapping[str, str], where: str) -> dict[str, Any]:
        """Return the columns that the schema does not read.

        Raises UserError for those that must not be left out.
        """
        used = self._schema.used_fields({field: row[column] for field, column in columns.items()})
        read = {field: columns[field] for field in (*used, *COMMON_FIELDS) if field in columns}
        unread = unread_columns(row, {*read.values()})
        if not unread:
            return {}
        refuse_unsupported(unread, where)
        if self._detected:
            candidates = {
                name: value for name, value in unread.items() if normalize_name(name) not in self._columns
            }
            column = task_column(candidates, self._schema.fields, [row[name] for name in read.values()])
            self._refuse_column(column, unread, read, "part of the task", where)
        return unread

    def _refuse_column(
        self, column: str | None, unread: Mapping[str, Any], read: Mapping[str, str], what: str, where: str
    ) -> None:
        """Raise UserError for an unread column, if any, and say how to read it.

        read: the column of each field.
        """
        if column is None:
            return
        name = self._schema.name
        reason = f"looks like {what}, but format {name} (recognized from the columns) does not read it"
        remedy = "write its text into a column that is read, map it to a field with columns"
        if name == CAPTION and normalize_name(column) in QUESTIONS:
            answer = next(read[field] for field in self._schema.fields if field in read)
            remedy = f"set columns: {{question: {column}, answer: {answer}}} to train on it as a question"
        leave_out = f"or set format: {name} to leave it out"
        raise UserError(
            f"{where}: {column}: {reason}, got {type_name(unread[column])}; {remedy}, {leave_out}"
        )


def detect_format(row: Any, columns: Mapping[str, str], where: str) -> str:
    """Return the name of the schema that a row matches once its columns have the names of fields."""
    options, fields = all_options(), all_fields()
    known = {field: column for field, column in columns.items() if field in fields and field not in options}
    found = find_columns(_object(row, where, "columns"), known, fields, where, strict=False)
    try:
        return detect_schema(row_with_fields(row, found), where)
    except UserError:
        unknown = next((field for field in columns if field not in fields | options), None)
        if unknown is None:
            raise
        names = ", ".join(sorted(fields))
        raise UserError(f"{where}: columns: expected fields, got {unknown!r}; use {names}") from None


def _object(row: Any, where: str, columns: str) -> Row:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object with {columns}, got {type_name(row)}")
    return row
