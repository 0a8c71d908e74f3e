"""`Sample`, what every row of every source becomes: a dialogue, a document, or answers that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ft.model.added_tokens import MEDIA_TOKEN

ROLES = ("system", "user", "assistant")
DOCUMENT = "document"  # the role of text that the model continues instead of answering; alone in its sample
CHUNK = "chunk"  # the role of all messages of a few-shot prompt: each ends with a chunk's end but the last
UNNAMED_TASK = "other"

Image = str | bytes  # a path, a URL, or an image file's content


@dataclass(frozen=True)
class Video:
    """Frames in order, or a video file."""

    frames: tuple[Image, ...] = ()
    file: Image | None = None


Medium = Image | Video  # what one <image> in the text stands for


@dataclass(frozen=True)
class Sample:
    """One row of a source, validated; its images are not opened yet.

    Attributes:
        messages: ``role`` and ``content``, typed blocks ``{"type": "image"}`` or ``{"type": "text", "text":
            ...}``, one image block for each of ``images`` in order; ``"loss": False`` on an assistant message
            that is not trained on. The one message of a document (captions, interleaved documents) has the
            role `DOCUMENT`.
        task: group name in evaluation results.
        where: file and row, for error messages.
        rejected: in a preference pair, the messages of the worse answer (the better one ends ``messages``).
        label: of an answer that is labelled good (True) or bad (False), whether it is good; else None.
        unread: columns of text in the row, and keys of its messages, that its schema does not read.
        other_answers: reference answers of evaluation beside the one in ``messages``, which alone is trained
            on; an answer that several people gave is there several times.
    """

    messages: list[dict[str, Any]]
    images: list[Medium]
    task: str
    where: str
    rejected: list[dict[str, Any]] | None = None
    unread: tuple[str, ...] = ()
    other_answers: tuple[str, ...] = ()
    label: bool | None = None


def text_message(role: str, text: str) -> dict[str, Any]:
    """Return a message of text only."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, without its images."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def display_text(message: Mapping[str, Any]) -> str:
    """Return a message for people to read, with ``<image>`` for each image."""
    return "".join(block["text"] if block["type"] == "text" else MEDIA_TOKEN for block in message["content"])
