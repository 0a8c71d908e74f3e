"""What a dataset schema is, the registered schemas, and how a row's schema is recognized.

To add one for rows like ``{"photo": "1.jpg", "riddle": "Which digit?", "solution": "7"}``, write a file in
this folder (outside it, use absolute imports):

    from flamingo_ft.data.fields import Row, nonempty_text_field

    from .schema import MediaRef, ParsedRow, Schema, Turn, has_columns, register_schema


    def parse_riddle(row: Row, where: str) -> ParsedRow:
        riddle = nonempty_text_field(row, "riddle", where)
        question = [{"type": "image"}, {"type": "text", "text": riddle}]
        answer = [{"type": "text", "text": nonempty_text_field(row, "solution", where)}]
        turns = [
            Turn("user", question, f"{where}: riddle"),
            Turn("assistant", answer, f"{where}: solution"),
        ]
        return ParsedRow(turns, images=[MediaRef(row.get("photo"), f"{where}: photo")])


    register_schema(
        Schema(
            "riddles",
            fields=("photo", "riddle", "solution"),
            matches=has_columns("photo", "riddle", "solution"),
            parse=parse_riddle,
            reads_common_media=False,
        )
    )

Import it in ``schemas/__init__.py``, as ``from . import riddles as riddles``, and add its columns for
messages, ``"riddles": "photo, riddle, solution"``, to `DATASET_FORMATS` in ``config/tables.py``, above any
format that would also match its rows. If images are in ``image`` or ``images``, don't list them in
``fields``, leave ``reads_common_media`` at True, and return ``ParsedRow(turns, images_of(row, where))``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo_ft.config.tables import DATASET_FORMATS
from flamingo_ft.data.fields import TAR_MEMBERS, Row, is_blank, list_field, type_name
from flamingo_ft.errors import UserError

from .columns import guess_columns

MEDIA_FIELDS = ("image", "images", "video", "videos")
COLUMNS_EXAMPLE = dict.fromkeys(("image", "question", "answer"), "COLUMN")
COMMON_FIELDS = (*MEDIA_FIELDS, "boxes", "task")  # belong to every schema: they never count as unread columns


@dataclass(frozen=True)
class MediaRef:
    """An image or video as it appears in a row. where: the field it was read from, for error messages."""

    value: Any
    where: str


@dataclass(frozen=True)
class Turn:
    """A message whose content is not parsed yet.

    role: "system", "user" or "assistant", or `DOCUMENT` alone in its row. content: text, in which each
    ``<image>`` stands for an image, or typed blocks, ``{"type": "image"}`` and ``{"type": "text", "text":
    "..."}``; the text of a block keeps ``<image>`` literal. where: the field it was read from, for error
    messages. loss: whether it is trained on, if its role is "assistant". unread: its keys that hold text but
    are not read, such as "messages[].language".
    """

    role: str
    content: Any
    where: str
    loss: bool = True
    unread: Sequence[str] = ()


@dataclass(frozen=True)
class ParsedRow:
    """The messages of a row and its images and videos, not yet matched with the image markers and blocks.

    If the messages have no marker and no image block, the images are shown first in the first user message.
    rejected: in a preference pair, the messages of the worse answer. other_answers: further reference answers
    beside the one that is trained on, for evaluation. label: whether a labelled answer is good.
    """

    turns: Sequence[Turn]
    images: Sequence[MediaRef] = ()
    videos: Sequence[MediaRef] = ()
    rejected: Sequence[Turn] | None = None
    other_answers: Sequence[str] = ()
    label: bool | None = None

    @property
    def unread(self) -> list[str]:
        """Return the unread keys of all messages, each once."""
        return [*dict.fromkeys(key for turn in (*self.turns, *(self.rejected or ())) for key in turn.unread)]


RowParser = Callable[[Row, str], ParsedRow]
"""Parses a row. The second argument is the row's name in error messages, "FILE: row N".

Raises UserError that names the field, "FILE: row N: field: ...".
"""


@dataclass(frozen=True)
class DataFile:
    """The file that a row came from, for schemas whose rows refer to other rows or other files.

    image_root: folder that relative paths start from. options: entries of ``columns`` that are settings of
    the schema, not column names (`Schema.options`). find: returns another row of the file by its id, or None.
    """

    path: Path
    image_root: Path
    options: Mapping[str, str]
    find: Callable[[str], Row | None]


@dataclass(frozen=True)
class Schema:
    """How the rows of one dataset format are recognized and parsed.

    Attributes:
        name: the value of ``format`` in a recipe.
        fields: the columns it reads besides `COMMON_FIELDS`, in lower case: a row's columns are compared with
            them without case, and a recipe's ``columns`` maps them to columns of other names. An image column
            of its own belongs here too; a column that is not listed counts as unread, and a row of a detected
            format is refused if an unread column looks like part of the task.
        matches: whether a row has this format, judged by its columns.
        parse: turns a row, with its columns under the names in ``fields``, into messages.
        open_file: in place of ``parse``, for schemas whose rows refer to other rows or files; called once per
            data file.
        options: keys of ``columns`` that are settings of the schema, not columns; in ``fields`` as well.
        reads_common_media: whether images come from ``image``, ``images``, ``video`` or ``videos``; if not, a
            recipe's ``columns`` cannot map these.
        is_preference: whether rows are pairs of a better and a worse answer, for ``train.method: dpo``.
        has_label: whether rows are answers labelled good or bad, for ``train.method: kto``.
        selects: returns the one of ``fields`` that a row is read from, if they are alternatives; the others
            count as unread.
    """

    name: str
    fields: tuple[str, ...]
    matches: Callable[[Row], bool]
    parse: RowParser | None = None
    open_file: Callable[[DataFile], RowParser] | None = None
    options: tuple[str, ...] = ()
    reads_common_media: bool = True
    is_preference: bool = False
    has_label: bool = False
    selects: Callable[[Row], str | None] | None = None

    def used_fields(self, row: Row) -> tuple[str, ...]:
        """Return the fields that parsing ``row`` reads."""
        selected = self.selects(row) if self.selects else None
        return self.fields if selected is None else (selected,)

    def parser(self, file: DataFile) -> RowParser:
        """Return the parser for the rows of ``file``."""
        if self.open_file is not None:
            return self.open_file(file)
        assert self.parse is not None, f"schema {self.name} has neither parse nor open_file"
        return self.parse


SCHEMAS: dict[str, Schema] = {}


class UnknownColumns(UserError):
    """No format has the columns of a row. problem: the message without its remedy."""

    def __init__(self, message: str, problem: str = ""):
        super().__init__(message)
        self.problem = problem


def register_schema(schema: Schema, description: str | None = None) -> Schema:
    """Make a schema known to recipes (``format``), to recognition and to reading.

    Args:
        description: its columns, as shown in messages; only for schemas outside this package, which are not
            in ``config/tables.py``. Such a schema is tried after the others.
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
    """Return the name of the first schema in `DATASET_FORMATS` that matches the row.

    Raises UnknownColumns listing the columns of the row and of every schema.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object, got {type_name(row)}")
    name = next((name for name in DATASET_FORMATS if name in SCHEMAS and SCHEMAS[name].matches(row)), None)
    if name is None:
        columns = ", ".join(column for column in row if column != TAR_MEMBERS) or "none"
        formats = f"{', '.join(DATASET_FORMATS)}; README.md, Your data, has their columns"
        problem = f"{where}: no format has these columns, got {columns}"
        remedy = f"{_remedy(guess_columns(row))}, or use those of a format ({formats})"
        raise UnknownColumns(f"{problem}; {remedy}", problem)
    return name


def _remedy(guess: Mapping[str, str]) -> str:
    """Return how to name the columns of a row. guess: those that it seems to have."""
    named = (guess or COLUMNS_EXAMPLE).items()
    columns = ", ".join(f"{field}: {column}" for field, column in named)
    options = " ".join(shlex.join(["--column", f"{field}={column}"]) for field, column in named)
    return f"name them in the recipe, such as columns: {{{columns}}}, or for a new recipe with {options}"


def check_columns(columns: Mapping[str, str], name: str, where: str) -> None:
    """Raise UserError for a ``columns`` entry that is not a field of schema ``name``."""
    schema = SCHEMAS[name]
    common = COMMON_FIELDS if schema.reads_common_media else ("boxes", "task")
    known = {*schema.fields, *schema.options, *common}
    unknown = next((field for field in columns if field not in known), None)
    if unknown is not None:
        raise UserError(
            f"{where}: columns: expected fields of {name}, got {unknown!r}; use {', '.join(sorted(known))}"
        )


def described_columns(name: str) -> str:
    """Return the columns of schema ``name``, as messages show them."""
    return DATASET_FORMATS[name]


def row_with_fields(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row with the value of each field under the field's name too.

    columns: the column of each field.
    """
    return {**row, **{field: row[column] for field, column in columns.items()}}


def has_columns(*names: str) -> Callable[[Row], bool]:
    """Return a `Schema.matches` for rows that have all of these columns."""
    return lambda row: all(name in row for name in names)


def images_of(row: Row, where: str) -> list[MediaRef]:
    """Return the images of ``image`` (one, or a list) or of ``images`` (a list)."""
    return _media(row, "image", where, _one_or_more)


def videos_of(row: Row, where: str) -> list[MediaRef]:
    """Return the videos of ``video`` (a file, or a list of frames) or of ``videos`` (a list of those)."""
    return _media(row, "video", where, lambda value, place: [MediaRef(value, place)])


def _media(
    row: Row, name: str, where: str, parse_single: Callable[[Any, str], list[MediaRef]]
) -> list[MediaRef]:
    plural = f"{name}s"
    single = [] if _is_empty(row.get(name)) else parse_single(row[name], f"{where}: {name}")
    several = [] if _is_empty(row.get(plural)) else _several(row, name, plural, where)
    if _is_empty(several):  # an empty list may have been given as JSON text
        several = []
    if single and several:
        raise UserError(f"{where}: expected {name} or {plural}, got both; join them in {plural}")
    return single or [MediaRef(value, f"{where}: {plural}[{index}]") for index, value in enumerate(several)]


def _several(row: Row, name: str, plural: str, where: str) -> list[Any]:
    try:
        return list_field(row, plural, where)
    except UserError as error:
        if isinstance(row[plural], str):
            raise UserError(f"{error}; the path of one {name} belongs in the field {name}") from None
        raise


def _one_or_more(value: Any, place: str) -> list[MediaRef]:
    if isinstance(value, list):
        return [MediaRef(one, f"{place}[{index}]") for index, one in enumerate(value)]
    return [MediaRef(value, place)]


def _is_empty(value: Any) -> bool:
    """Whether a field holds no image: blank, an empty list, or a list of blanks only.

    A blank among images is kept and reported as an error: it would shift the images after it.
    """
    return is_blank(value) or (isinstance(value, list) and all(map(is_blank, value)))
