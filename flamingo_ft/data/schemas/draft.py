"""What each schema makes of a row, before images are matched with their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Given:
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
class Draft:
    """A row's messages, and the images and videos that its text has places for."""

    turns: Sequence[Turn]
    images: Sequence[Given] = ()
    videos: Sequence[Given] = ()
    rejected: Sequence[Turn] | None = field(default=None)

    @property
    def unread(self) -> list[str]:
        """Keys of messages with text that nothing reads."""
        return [*dict.fromkeys(key for turn in (*self.turns, *(self.rejected or ())) for key in turn.unread)]
