"""Rows of one source to samples, by the schema that the recipe names or the first row fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flamingo_ft.data.fields import Row, optional_text, type_name
from flamingo_ft.data.media_resolver import MediaResolver
from flamingo_ft.data.sample import Sample
from flamingo_ft.errors import UserError

from .build_sample import build_sample
from .columns import (
    find_columns,
    image_column,
    lost_column,
    normalize_name,
    refuse_unsupported,
    text_columns,
    unread_columns,
)
from .mimicit import IMAGES_FILE, ImagesById, images_file, read_mimicit
from .table import COMMON, MIMICIT, SCHEMAS, check_columns, detect_schema

Find = Callable[[str], Row | None]
CAPTION = "caption"
QUESTIONS = ("question", "query", "prompt", "instruction")  # columns that a caption may be the answer to
ALL_FIELDS = frozenset((*COMMON, *(field for schema in SCHEMAS.values() for field in schema.fields)))


class RowReader:
    """Reads rows of one schema. ``columns`` says under which names its fields stand.

    guessed: the schema was recognised, not named by the recipe. Then a row with a column that looks like part of its
    task, and that the schema does not read, is refused.
    """

    def __init__(
        self,
        schema: str,
        columns: Mapping[str, str],
        locator: MediaResolver,
        where: str,
        guessed: bool = False,
    ):
        check_columns(columns, schema, where)
        self.schema = schema
        self._columns = {field: column for field, column in columns.items() if field != IMAGES_FILE}
        self._images_file = columns.get(IMAGES_FILE)
        self._locator = locator
        self._guessed = guessed
        self._images: dict[str, ImagesById] = {}
        self._last: tuple[tuple[str, ...] | None, dict[str, str]] = (
            None,
            {},
        )  # column names, the column of each field

    def read(self, row: Any, where: str, file: str, find: Find) -> Sample:
        """The sample of a parsed row of ``file``; ``find`` gives other rows of that file by their id."""
        found = self._columns_in(row, where)
        unread = self._unread(row, found, where)
        row = _with_fields(row, found)
        task = optional_text(row, "task", where)
        if self.schema == MIMICIT:
            draft = read_mimicit(row, where, lambda key: self._other(find(key), where), self._images_of(file))
        else:
            draft = SCHEMAS[self.schema].read(row, where)
        sample = build_sample(draft, task, where, self._locator)
        if self._guessed and not sample.images:
            self._refuse_guess(image_column(unread), unread, found, "the image", where)
        names = (*text_columns(unread), *draft.unread)
        return replace(sample, unread=names) if names else sample

    def unread(self, row: Any, where: str) -> tuple[str, ...]:
        """The columns of text that the schema does not read. UserError where one must not be left out of a guess."""
        try:
            return tuple(text_columns(self._unread(row, self._columns_in(row, where), where)))
        except UserError:
            if self._guessed:
                raise
            return ()  # the row is refused when it is read

    def _columns_in(self, row: Any, where: str) -> dict[str, str]:
        """The column of each field. UserError for what is no row, or lacks a column."""
        schema = SCHEMAS[self.schema]
        names = tuple(_object(row, where, schema.wants))
        if names != self._last[0]:  # rows mostly have the same columns
            self._last = names, find_columns(row, self._columns, (*schema.fields, *COMMON), where)
        return self._last[1]

    def _unread(self, row: Row, found: Mapping[str, str], where: str) -> dict[str, Any]:
        """The columns that the schema does not read. UserError for those that must not be left out."""
        schema = SCHEMAS[self.schema]
        fields = schema.reads({field: row[column] for field, column in found.items()})
        read = {field: found[field] for field in (*fields, *COMMON) if field in found}
        unread = unread_columns(row, {*read.values()})
        if not unread:
            return {}
        refuse_unsupported(unread, where)
        if self._guessed:
            asked = {
                name: value for name, value in unread.items() if normalize_name(name) not in self._columns
            }
            lost = lost_column(asked, schema.fields, [row[column] for column in read.values()])
            self._refuse_guess(lost, unread, read, "part of the task", where)
        return unread

    def _refuse_guess(
        self, column: str | None, unread: Mapping[str, Any], read: Mapping[str, str], what: str, where: str
    ) -> None:
        """Refuse a row for an unread column, if any, and say how to read it. read: the column of each field."""
        if column is None:
            return
        reason = f"looks like {what}, but schema {self.schema} (recognised from the columns) does not read it"
        remedy = "write its text into a column that is read, map it to a field with columns"
        if self.schema == CAPTION and normalize_name(column) in QUESTIONS:
            answer = next(read[field] for field in SCHEMAS[CAPTION].fields if field in read)
            remedy = f"set columns: {{question: {column}, answer: {answer}}} to ask it"
        leave_out = f"or set format: {self.schema} to leave it out"
        raise UserError(
            f"{where}: {column}: {reason}, got {type_name(unread[column])}; {remedy}, {leave_out}"
        )

    def _other(self, row: Row | None, where: str) -> Row | None:
        return None if row is None else _with_fields(row, self._columns_in(row, where))

    def _images_of(self, file: str) -> ImagesById:
        if file not in self._images:
            root = self._locator.root or Path()
            self._images[file] = ImagesById(images_file(Path(file), self._images_file, root))
        return self._images[file]


def detect_format(row: Any, columns: Mapping[str, str], where: str) -> str:
    """The schema that a row fits, once its columns have the names of fields."""
    columns = {field: column for field, column in columns.items() if field != IMAGES_FILE}
    found = find_columns(_object(row, where, "columns"), columns, ALL_FIELDS, where, strict=False)
    return detect_schema(_with_fields(row, found), where)


def _with_fields(row: Row, found: Mapping[str, str]) -> Row:
    """The row with the columns that hold fields under the fields' names too."""
    return {**row, **{field: row[column] for field, column in found.items()}}


def _object(row: Any, where: str, wants: str) -> Row:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: found {type_name(row)}, wanted an object with {wants}")
    return row
