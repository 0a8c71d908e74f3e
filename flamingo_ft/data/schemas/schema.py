"""What a dataset schema is, and what it makes of a row.

To add one: write a file that defines a `Schema` and passes it to `register_schema`, import the file in
``schemas/__init__.py``, and name the format in ``config/tables.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo_ft.data.fields import Row, is_blank, list_field
from flamingo_ft.errors import UserError

MEDIA_FIELDS = ("image", "images", "video", "videos")


@dataclass(frozen=True)
class MediaRef:
    """An image or video as it appears in a row. where: the field it was read from, for error messages."""

    value: Any
    where: str


@dataclass(frozen=True)
class Turn:
    """A message whose content is not parsed yet: text with ``<image>`` markers, or typed blocks as the user
    wrote them.

    where: the field it was read from. loss: whether it is trained on. unread: its keys with text that no
    schema reads, such as "messages[].language".
    """

    role: str
    content: Any
    where: str
    loss: bool = True
    unread: Sequence[str] = ()


@dataclass(frozen=True)
class ParsedRow:
    """The messages of a row and its images and videos, not yet matched with the markers in the text.

    rejected: in a preference pair, the messages of the worse answer.
    """

    turns: Sequence[Turn]
    images: Sequence[MediaRef] = ()
    videos: Sequence[MediaRef] = ()
    rejected: Sequence[Turn] | None = field(default=None)

    @property
    def unread(self) -> list[str]:
        """Keys of messages with text that no schema reads, each once."""
        return [*dict.fromkeys(key for turn in (*self.turns, *(self.rejected or ())) for key in turn.unread)]


RowParser = Callable[[Row, str], ParsedRow]
"""From a row and what error messages call it ("FILE: row N") to its messages.

Raises UserError naming the field.
"""


@dataclass(frozen=True)
class DataFile:
    """The file that a row came from, for schemas whose rows refer to other rows or other files.

    image_root: folder that relative paths start from. options: entries of ``columns`` that are settings of
    the schema, not column names (`Schema.options`). find: another row of the file by its id; None if there is
    none.
    """

    path: Path
    image_root: Path
    options: Mapping[str, str]
    find: Callable[[str], Row | None]


@dataclass(frozen=True)
class Schema:
    """How the rows of one dataset format are recognized and parsed.

    name: as in ``data.train[].format``. fields: the columns it reads besides images and task. matches:
    whether a row has this format, judged by its columns. parse: turns a row into messages.
    """

    name: str
    fields: tuple[str, ...]
    matches: Callable[[Row], bool]
    parse: RowParser | None = None
    open_file: Callable[[DataFile], RowParser] | None = None
    """In place of ``parse``, for schemas whose rows refer to other rows or files: called once per data
    file."""
    options: tuple[str, ...] = ()
    """Keys of ``columns`` that are settings of the schema, not columns."""
    reads_media: bool = True
    """Whether images and videos come from the columns `MEDIA_FIELDS`."""
    is_preference: bool = False
    """Whether rows are pairs of a better and a worse answer, for ``train.method: dpo``."""
    selects: Callable[[Row], str | None] | None = None
    """Which one of ``fields`` a row is read from, if they are alternatives."""

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
    several = [] if _is_empty(row.get(plural)) else list_field(row, plural, where)
    if _is_empty(several):  # an empty list may have been given as JSON text
        several = []
    if single and several:
        raise UserError(f"{where}: expected {name} or {plural}, got both; join them in {plural}")
    return single or [MediaRef(value, f"{where}: {plural}[{index}]") for index, value in enumerate(several)]


def _one_or_more(value: Any, place: str) -> list[MediaRef]:
    if isinstance(value, list):
        return [MediaRef(one, f"{place}[{index}]") for index, one in enumerate(value)]
    return [MediaRef(value, place)]


def _is_empty(value: Any) -> bool:
    """Whether a field holds no image: blank, an empty list, or a list of blanks only.

    A blank among images is kept and reported as an error: it would shift the images after it.
    """
    return is_blank(value) or (isinstance(value, list) and all(map(is_blank, value)))
