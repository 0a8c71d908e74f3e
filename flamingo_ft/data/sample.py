"""`Sample`, what every row of every source becomes: a dialogue, a document, or answers that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN
from flamingo_ft.model.boxes import WIDEST
from flamingo_ft.model.geometry import Corners, ImageGeometry, area, clip

ROLES = ("system", "user", "assistant")
DOCUMENT = "document"  # the role of text that the model continues instead of answering; alone in its sample
CHUNK = "chunk"  # the role of all messages of a few-shot prompt: each ends with a chunk's end but the last
UNNAMED_TASK = "other"
BOX_MARKER = "<box>"  # in the texts of a row with boxes
BOX_TOLERANCE = 1.0  # pixels that a box may extend beyond its image: annotations are often rounded

Image = str | bytes  # a path, a URL, or an image file's content


@dataclass(frozen=True)
class Video:
    """Frames in order, or a video file."""

    frames: tuple[Image, ...] = ()
    file: Image | None = None


Medium = Image | Video  # what one <image> in the text stands for


@dataclass(frozen=True)
class Box:
    """A box on one of a sample's images.

    corners: left, top, right and bottom in pixels of the upright image or, if ``is_relative``, as fractions
    of its width and height. image: index among the sample's images. where: the field, for error messages.
    """

    corners: Corners
    image: int = 0
    is_relative: bool = False
    where: str = "box"

    def pixels(self, width: int, height: int) -> Corners:
        """Return the corners in pixels of an image of this size, clipped to it.

        Raises UserError for a box that extends beyond the image, and for one without area on it.
        """
        left, top, right, bottom = self.corners
        if self.is_relative:
            return left * width, top * height, right * width, bottom * height
        if (
            min(left, top) < -BOX_TOLERANCE
            or right > width + BOX_TOLERANCE
            or bottom > height + BOX_TOLERANCE
        ):
            raise UserError(
                f"{self.where}: outside of its image of {width} x {height} pixels, got {list(self.corners)}; "
                "correct it, or set box_unit"
            )
        clipped = clip(self.corners, (0, 0, width, height))
        if not area(clipped):
            raise UserError(
                f"{self.where}: no area inside its image of {width} x {height} pixels, got "
                f"{list(self.corners)}; correct or remove it"
            )
        return clipped


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
        boxes: what the blocks ``{"type": "box", "index": ...}`` in the messages stand for. `BoxWriter` turns
            those into text blocks that keep the index under ``box``.
        geometries: once the boxes are text, how the model sees each image with boxes; None for other images.
    """

    messages: list[dict[str, Any]]
    images: list[Medium]
    task: str
    where: str
    rejected: list[dict[str, Any]] | None = None
    unread: tuple[str, ...] = ()
    other_answers: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    geometries: tuple[ImageGeometry | None, ...] = ()
    label: bool | None = None


def text_message(role: str, text: str) -> dict[str, Any]:
    """Return a message of text only."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, without its images, and ``<box>`` for boxes that are not text yet."""
    return "".join(_text(block) for block in message["content"] if block["type"] in ("text", "box"))


def display_text(message: Mapping[str, Any]) -> str:
    """Return a message for people to read, with ``<image>`` for each image."""
    return "".join(_text(block) for block in message["content"])


def boxes_in(message: Mapping[str, Any]) -> list[int]:
    """Return the indices of the boxes in a message, in order."""
    return [
        block["index"] if block["type"] == "box" else block["box"]
        for block in message["content"]
        if block["type"] == "box" or "box" in block
    ]


def with_box_texts(messages: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return messages with the text of each box in place of its block."""
    return [
        {**message, "content": [_written(block, texts) for block in message["content"]]}
        for message in messages
    ]


def with_widest_boxes(sample: Sample) -> Sample:
    """Return the sample with the longest text that a box may have, to measure texts without their images."""
    if not sample.boxes:
        return sample
    texts = [WIDEST] * len(sample.boxes)
    rejected = None if sample.rejected is None else with_box_texts(sample.rejected, texts)
    return replace(sample, messages=with_box_texts(sample.messages, texts), rejected=rejected)


def _text(block: Mapping[str, Any]) -> str:
    if block["type"] == "text":
        return block["text"]
    return BOX_MARKER if block["type"] == "box" else MEDIA_TOKEN


def _written(block: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    if block["type"] != "box":
        return block
    return {"type": "text", "text": texts[block["index"]], "box": block["index"]}
