"""From a `ParsedRow` to a `Sample`: split content at its markers, check roles, give each image its place.

Nothing is opened or downloaded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from flamingo_ft.data.fields import check_unicode, has_content, is_blank, text_field, type_name
from flamingo_ft.data.media_resolver import MediaResolver
from flamingo_ft.data.sample import DOCUMENT, ROLES, UNNAMED_TASK, Box, Medium, Sample
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import plural
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

from .boxes import BoxPart, check_boxes, refuse_markers, split_markers
from .schema import MediaRef, ParsedRow, Turn

VIDEO_MARKER = "<video>"
IMAGE_BLOCKS = ("image", "image_url")
VIDEO_BLOCKS = ("video", "video_url")
# Where a block keeps its image: TRL's and transformers' names, OpenAI's image_url.
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
VIDEO_KEYS = ("video", "video_url", "url", "path", "base64", "bytes")
CONTENT_KEYS = ("text", *IMAGE_KEYS, *VIDEO_KEYS)
MARKERS = re.compile(f"({re.escape(MEDIA_TOKEN)}|{re.escape(VIDEO_MARKER)})")
IMAGE_MARKERS = re.compile(f"({re.escape(MEDIA_TOKEN)})")


@dataclass(frozen=True)
class Placeholder:
    """Where an image or video belongs in a text. medium: the medium, if the block itself has it."""

    video: bool = False
    medium: MediaRef | None = None


Part = str | Placeholder | BoxPart  # of a message's content


def build_sample(
    parsed: ParsedRow,
    task: str | None,
    where: str,
    resolver: MediaResolver,
    boxes: Sequence[Box] | None = None,
) -> Sample:
    """Return the sample of a row. Raises UserError naming the field that is wrong.

    boxes: those of its column, for which markers stand in the texts; None for a row without the column.
    """
    check_roles(parsed.turns, where)
    contents = [parse_content(turn.content, turn.where, bool(parsed.videos)) for turn in parsed.turns]
    contents = _with_media(parsed, contents, where)
    media = [
        _resolved(part, resolver) for content in contents for part in content if isinstance(part, Placeholder)
    ]
    rejected = _rejected_contents(parsed)
    if boxes is not None:
        numbers = count()
        contents = [split_markers(content, numbers) for content in contents]
        rejected = rejected and [split_markers(content, numbers) for content in rejected]
        check_boxes(boxes, next(numbers), media, where)
        refuse_markers(parsed.other_answers, where)
    return Sample(
        _messages(parsed.turns, contents),
        media,
        task or UNNAMED_TASK,
        where,
        None if rejected is None else _messages(parsed.rejected or (), rejected),
        other_answers=tuple(parsed.other_answers),
        boxes=tuple(boxes or ()),
        label=parsed.label,
    )


def check_roles(turns: Sequence[Turn], where: str) -> None:
    """Raise UserError unless the turns are one document, or a dialogue.

    A dialogue has at most one system message, first; then user and assistant alternate, the user first.
    """
    roles = [turn.role for turn in turns]
    if roles == [DOCUMENT]:
        return
    dialogue = turns[0].where.partition("[")[0] if turns else where
    for turn in turns:
        if turn.role not in ROLES:
            raise UserError(f"{turn.where}: role: expected one of {', '.join(ROLES)}, got {turn.role!r}")
    if "assistant" not in roles:
        raise UserError(f"{dialogue}: no assistant message; add an answer to train on")
    previous = "system"
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise UserError(f"{turn.where}: a system message must come first; move or join it")
        if turn.role == "assistant" and previous == "system":
            raise UserError(f"{dialogue}: the assistant speaks first; add the user message that it answers")
        if turn.role == previous and index > 0:
            raise UserError(
                f"{turn.where}: expected user and assistant in turn, got {turn.role} after {turn.role}; "
                "join them"
            )
        previous = turn.role


def text_to_blocks(text: str) -> list[dict[str, Any]]:
    """Return text as typed blocks, an image block for each ``<image>``."""
    return [_block(part) for part in _split_text(text)]


def parse_content(content: Any, where: str, videos: bool) -> list[Part]:
    """Split a message's content into text and placeholders.

    In plain text each ``<image>``, and with ``videos`` each ``<video>``, is a placeholder. In typed blocks it
    is text: the blocks themselves say where images are.
    """
    if isinstance(content, str):
        parts = _split_text(check_unicode(content, where), videos)
    elif isinstance(content, list):
        parts = [_parse_block(block, f"{where}[{index}]") for index, block in enumerate(content)]
    else:
        raise UserError(f"{where}: expected text or a list of typed blocks, got {type_name(content)}")
    if not any(not isinstance(part, str) or part.strip() for part in parts):
        raise UserError(f"{where}: empty; write text or an image, or remove the turn")
    return [part for part in parts if part != ""]


def _split_text(text: str, videos: bool = False) -> list[Part]:
    placeholders = {MEDIA_TOKEN: Placeholder()}
    if videos:
        placeholders[VIDEO_MARKER] = Placeholder(video=True)
    parts = (MARKERS if videos else IMAGE_MARKERS).split(text)
    return [placeholders.get(part, part) for part in parts if part]


def _block(part: Part) -> dict[str, Any]:
    """Return a part as a block of `Sample.messages`."""
    if isinstance(part, BoxPart):
        return {"type": "box", "index": part.index}
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _parse_block(block: Any, where: str) -> Part:
    if not isinstance(block, Mapping):
        raise UserError(f"{where}: expected a block of type text, image or video, got {type_name(block)}")
    block_type = block.get("type")
    if not isinstance(block_type, str) or block_type not in ("text", *IMAGE_BLOCKS, *VIDEO_BLOCKS):
        raise UserError(f"{where}.type: expected text, image or video, got {block_type!r}")
    if block_type == "text":
        _check_single(block, block_type, ("text",), where)
        return text_field(block, "text", where)
    is_video = block_type in VIDEO_BLOCKS
    keys = VIDEO_KEYS if is_video else IMAGE_KEYS
    _check_single(block, block_type, keys, where)
    key = next((key for key in keys if not is_blank(block.get(key))), None)
    if key is None:
        if block_type.endswith("_url"):
            raise UserError(f"{where}.{block_type}: expected a URL or a data: URI, got nothing")
        return Placeholder(is_video)
    return Placeholder(is_video, MediaRef(_block_medium(block[key], key), f"{where}.{key}"))


def _check_single(block: Mapping[str, Any], block_type: str, keys: Sequence[str], where: str) -> None:
    """Refuse a block with an image beside its text, text beside its image, or two images: one would be lost.

    keys: those that a block of this type may have.
    """
    other = next(
        (key for key in block if key in CONTENT_KEYS and key not in keys and has_content(block[key])), None
    )
    if other is not None:
        got = type_name(block[other])
        raise UserError(
            f"{where}.{other}: not read in a block of type {block_type}, got {got}; "
            "give it a block of its own"
        )
    if block_type == "text":
        return
    sources = [key for key in block if key in keys and not is_blank(block[key])]
    if len(sources) > 1 and len({str(block[key]) for key in sources}) > 1 and {*sources} != {"path", "bytes"}:
        raise UserError(f"{where}: one block has two images, got {' and '.join(sources)}; keep one of them")


def _block_medium(value: Any, key: str) -> Any:
    """Return the medium of a block: OpenAI wraps a URL in an object, and ``base64`` is not a path."""
    if key.endswith("_url") and isinstance(value, Mapping):
        return value.get("url")
    return f"data:;base64,{value}" if key == "base64" and isinstance(value, str) else value


def _with_media(parsed: ParsedRow, contents: list[list[Part]], where: str) -> list[list[Part]]:
    """Return the contents with a medium in every placeholder."""
    empty = [
        part
        for content in contents
        for part in content
        if isinstance(part, Placeholder) and part.medium is None
    ]
    images = [Placeholder(False, medium) for medium in parsed.images]
    videos = [Placeholder(True, medium) for medium in parsed.videos]
    if not empty and (images or videos):
        first_user = next((index for index, turn in enumerate(parsed.turns) if turn.role == "user"), 0)
        contents[first_user] = [*images, *videos, *contents[first_user]]  # as in TRL
        return contents
    if any(part.video for part in empty):
        video_markers = sum(part.video for part in empty)
        _check_count(len(empty) - video_markers, len(images), MEDIA_TOKEN, "images", where)
        _check_count(video_markers, len(videos), VIDEO_MARKER, "videos", where)
        queues = {False: iter(images), True: iter(videos)}
    else:
        noun = "images and videos" if videos else "images"
        _check_count(len(empty), len(images) + len(videos), MEDIA_TOKEN, noun, where)
        queues = dict.fromkeys((False, True), iter([*images, *videos]))
    return [[_filled(part, queues) for part in content] for content in contents]


def _filled(part: Part, queues: dict[bool, Iterator[Placeholder]]) -> Part:
    return next(queues[part.video]) if isinstance(part, Placeholder) and part.medium is None else part


def _check_count(markers: int, media: int, marker: str, noun: str, where: str) -> None:
    if markers != media:
        remedy = f"add the missing {noun} or remove markers"
        found = plural(media, noun.removesuffix("s"))
        raise UserError(f"{where}: got {markers} {marker} markers but {found}; {remedy}")


def _resolved(part: Placeholder, resolver: MediaResolver) -> Medium:
    assert part.medium is not None
    resolve = resolver.video if part.video else resolver.image
    return resolve(part.medium.value, part.medium.where)


def _messages(turns: Sequence[Turn], contents: Sequence[Sequence[Part]]) -> list[dict[str, Any]]:
    return [_message(turn, content) for turn, content in zip(turns, contents, strict=True)]


def _message(turn: Turn, content: Sequence[Part]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": [_block(part) for part in content]}
    return message if turn.loss else {**message, "loss": False}


def _rejected_contents(parsed: ParsedRow) -> list[list[Part]] | None:
    """Return the contents of the worse answer; images in it are refused, since they belong to the prompt."""
    if parsed.rejected is None:
        return None
    contents = [parse_content(turn.content, turn.where, False) for turn in parsed.rejected]
    for turn, content in zip(parsed.rejected, contents, strict=True):
        if any(isinstance(part, Placeholder) for part in content):
            raise UserError(f"{turn.where}: the rejected answer has an image; move it to the prompt")
    return contents
