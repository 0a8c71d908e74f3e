"""What every source is brought to: a dialogue, a document or a pair of answers, with its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ft.model.added_tokens import MEDIA_TOKEN

ROLES = ("system", "user", "assistant")
DOCUMENT = "document"  # the role of text that is to be gone on with, not answered; alone in its sample
UNNAMED_TASK = "other"

Image = str | bytes  # a path, a URL, or an image file's content


@dataclass(frozen=True)
class Video:
    """Frames in order, or the video file that they are taken from."""

    frames: tuple[Image, ...] = ()
    file: Image | None = None


Medium = Image | Video  # what one <image> in the text stands for


@dataclass(frozen=True)
class Sample:
    """One row of a source, checked; its images are not opened yet.

    messages: ``role`` and ``content``, typed blocks ``{"type": "image"}`` or ``{"type": "text", "text": ...}``, one image
    block for each of ``images`` in order; ``"loss": False`` on an assistant's turn that is not learned. The one message
    of a document (captions, interleaved documents) has the role `DOCUMENT`.
    task: what evaluation counts it under. where: file and row, as errors name it.
    rejected: in a preference pair the messages with which a worse answer ends, where ``messages`` ends with the better.
    unread: columns of text in the row, and keys of its messages, that its schema does not read.
    """

    messages: list[dict[str, Any]]
    images: list[Medium]
    task: str
    where: str
    rejected: list[dict[str, Any]] | None = None
    unread: tuple[str, ...] = ()


def text_message(role: str, text: str) -> dict[str, Any]:
    """A message of words alone."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def message_text(message: Mapping[str, Any]) -> str:
    """The words of a message, without its images."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def display_text(message: Mapping[str, Any]) -> str:
    """A message for people to read, ``<image>`` where an image stands."""
    return "".join(block["text"] if block["type"] == "text" else MEDIA_TOKEN for block in message["content"])
