"""What each schema makes of a row, before images are matched with their places.

The fields in which rows keep their images and videos, named alike in all schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flamingo_ft.data.fields import Row, is_blank, list_field
from flamingo_ft.errors import UserError


@dataclass(frozen=True)
class MediaRef:
    """An image or video as a row has it, and the field it stands in."""

    value: Any
    where: str


@dataclass(frozen=True)
class Turn:
    """A message: ``content`` is text with markers, or typed blocks as users write them.

    unread: its keys with text that nothing reads, as "messages[].language".
    """

    role: str
    content: Any
    where: str
    loss: bool = True
    unread: Sequence[str] = ()


@dataclass(frozen=True)
class ParsedRow:
    """A row's messages, and the images and videos that its text has places for."""

    turns: Sequence[Turn]
    images: Sequence[MediaRef] = ()
    videos: Sequence[MediaRef] = ()
    rejected: Sequence[Turn] | None = field(default=None)

    @property
    def unread(self) -> list[str]:
        """Keys of messages with text that nothing reads."""
        return [*dict.fromkeys(key for turn in (*self.turns, *(self.rejected or ())) for key in turn.unread)]


MEDIA_FIELDS = ("image", "images", "video", "videos")


def images_of(row: Row, where: str) -> list[MediaRef]:
    """``image``: one, or several in a list; or ``images``: a list."""
    return _media(row, "image", where, _one_or_more)


def videos_of(row: Row, where: str) -> list[MediaRef]:
    """``video``: a file, or a list of frames; or ``videos``: a list of those."""
    return _media(row, "video", where, lambda value, place: [MediaRef(value, place)])


def _media(row: Row, name: str, where: str, single: Callable[[Any, str], list[MediaRef]]) -> list[MediaRef]:
    several = f"{name}s"
    one = [] if _is_none(row.get(name)) else single(row[name], f"{where}: {name}")
    listed = [] if _is_none(row.get(several)) else list_field(row, several, where)
    listed = [] if _is_none(listed) else listed  # it may have been a list as JSON text
    if one and listed:
        raise UserError(
            f"{where}: found both {name} and {several}, wanted one of them; join them into {several}"
        )
    return one or [MediaRef(value, f"{where}: {several}[{index}]") for index, value in enumerate(listed)]


def _one_or_more(value: Any, place: str) -> list[MediaRef]:
    if isinstance(value, list):
        return [MediaRef(one, f"{place}[{index}]") for index, one in enumerate(value)]
    return [MediaRef(value, place)]


def _is_none(value: Any) -> bool:
    """Whether a field says that there is no image: nothing, an empty list, or a list of nothing. Nulls among images are
    not passed over: which image is missing would go unnoticed."""
    return is_blank(value) or (isinstance(value, list) and all(map(is_blank, value)))
