"""Content of a message, as text with markers or as typed blocks, to text and places of images.

Drafts to samples: roles checked, each image matched with its place, nothing opened yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.data.fields import check_unicode, has_content, is_blank, text_field, type_name
from flamingo_ft.data.media_resolver import MediaResolver
from flamingo_ft.data.sample import DOCUMENT, ROLES, UNNAMED_TASK, Medium, Sample
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

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
class Place:
    """Where an image or video belongs; ``medium`` where the block brings it along."""

    video: bool = False
    medium: MediaRef | None = None


Part = str | Place


def split_text(text: str, videos: bool = False) -> list[Part]:
    """Text in which each ``<image>`` is an image, and where a row has videos each ``<video>`` a video."""
    parts = (MARKERS if videos else IMAGE_MARKERS).split(text)
    places = {MEDIA_TOKEN: Place(), VIDEO_MARKER: Place(video=True)} if videos else {MEDIA_TOKEN: Place()}
    return [places.get(part, part) for part in parts if part]


def text_to_blocks(text: str) -> list[dict[str, str]]:
    """Text as typed blocks, an image block for each ``<image>``."""
    return [typed(part) for part in split_text(text)]


def typed(part: Part) -> dict[str, str]:
    """A block as samples have it."""
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def parse_content(content: Any, where: str, videos: bool) -> list[Part]:
    """A message's content. In typed blocks of text a marker is but text: the blocks say where images are."""
    if isinstance(content, str):
        parts = split_text(check_unicode(content, where), videos)
    elif isinstance(content, list):
        parts = [_block(block, f"{where}[{index}]") for index, block in enumerate(content)]
    else:
        raise UserError(f"{where}: found {type_name(content)}, wanted text or a list of typed blocks")
    if not any(isinstance(part, Place) or part.strip() for part in parts):
        raise UserError(f"{where}: found no words, wanted text or an image; remove the turn")
    return [part for part in parts if part != ""]


def _block(block: Any, where: str) -> Part:
    if not isinstance(block, Mapping):
        raise UserError(f"{where}: found {type_name(block)}, wanted a block of type text, image or video")
    form = block.get("type")
    if form not in ("text", *IMAGE_BLOCKS, *VIDEO_BLOCKS):
        raise UserError(f"{where}.type: found {form!r}, wanted text, image or video")
    video = form in VIDEO_BLOCKS
    keys = () if form == "text" else VIDEO_KEYS if video else IMAGE_KEYS
    _check_alone(block, form, keys, where)
    if form == "text":
        return text_field(block, "text", where)
    key = next((key for key in keys if not is_blank(block.get(key))), None)
    if form.endswith("_url") and key is None:
        raise UserError(f"{where}.{form}: found nothing, wanted a URL or a data: URI")
    return Place(video, MediaRef(_medium(block[key], key), f"{where}.{key}") if key else None)


def _check_alone(block: Mapping[str, Any], form: str, keys: Sequence[str], where: str) -> None:
    """Refuse a block with an image beside its text, text beside its image, or two images: one would be lost."""
    own = keys or ("text",)
    other = next(
        (key for key in block if key in CONTENT_KEYS and key not in own and has_content(block[key])), None
    )
    if other is not None:
        got = type_name(block[other])
        raise UserError(
            f"{where}.{other}: not read in a block of type {form}, got {got}; give it a block of its own"
        )
    sources = [key for key in block if key in keys and not is_blank(block[key])]
    if len(sources) > 1 and len({str(block[key]) for key in sources}) > 1 and {*sources} != {"path", "bytes"}:
        raise UserError(f"{where}: one block has two images, got {' and '.join(sources)}; keep one of them")


def _medium(value: Any, key: str) -> Any:
    """OpenAI wraps a URL in an object; base64 is told from a path by the key."""
    if key.endswith("_url") and isinstance(value, Mapping):
        return value.get("url")
    return f"data:;base64,{value}" if key == "base64" and isinstance(value, str) else value


def build_sample(draft: ParsedRow, task: str | None, where: str, locator: MediaResolver) -> Sample:
    """The sample of a row. UserError naming the field in which something is wrong."""
    check_roles(draft.turns, where)
    contents = [parse_content(turn.content, turn.where, bool(draft.videos)) for turn in draft.turns]
    contents = _placed(draft, contents, where)
    media = [
        _located(part.medium, part.video, locator)
        for content in contents
        for part in content
        if isinstance(part, Place)
    ]
    messages = [_message(turn, content) for turn, content in zip(draft.turns, contents, strict=True)]
    return Sample(messages, media, task or UNNAMED_TASK, where, _rejected(draft))


def check_roles(turns: Sequence[Turn], where: str) -> None:
    """A dialogue: a system message at most first, then user and assistant in turn, the user first. Or one document."""
    roles = [turn.role for turn in turns]
    if roles == [DOCUMENT]:
        return
    for turn in turns:
        if turn.role not in ROLES:
            raise UserError(f"{turn.where}: found the role {turn.role!r}, wanted one of {', '.join(ROLES)}")
    if "assistant" not in roles:
        raise UserError(f"{_dialogue(turns, where)}: found no assistant turn, wanted one to learn from")
    previous = "system"
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise UserError(f"{turn.where}: found a system message here, wanted it first; move or join it")
        if turn.role == "assistant" and previous == "system":
            raise UserError(
                f"{_dialogue(turns, where)}: found an assistant turn first, wanted what it answers before it"
            )
        if turn.role == previous and index > 0:
            raise UserError(
                f"{turn.where}: found {turn.role} after {turn.role}, wanted user and assistant in turn; join them"
            )
        previous = turn.role


def _dialogue(turns: Sequence[Turn], where: str) -> str:
    """The field of a dialogue: that of its first turn, without its number."""
    return turns[0].where.partition("[")[0] if turns else where


def _placed(draft: ParsedRow, contents: list[list[Part]], where: str) -> list[list[Part]]:
    """The contents with a medium in every place."""
    open_places = [
        part for content in contents for part in content if isinstance(part, Place) and part.medium is None
    ]
    if not open_places and (draft.images or draft.videos):
        first = next((i for i, turn in enumerate(draft.turns) if turn.role == "user"), 0)
        contents[first] = [*_filled(draft), *contents[first]]  # before the first user turn, as in TRL
        return contents
    if any(place.video for place in open_places):
        _check_count(
            sum(not place.video for place in open_places), len(draft.images), MEDIA_TOKEN, "images", where
        )
        _check_count(
            sum(place.video for place in open_places), len(draft.videos), VIDEO_MARKER, "videos", where
        )
        queues = {False: iter(_filled(draft, videos=False)), True: iter(_filled(draft, images=False))}
    else:
        found = len(draft.images) + len(draft.videos)
        _check_count(
            len(open_places), found, MEDIA_TOKEN, "images" if not draft.videos else "images and videos", where
        )
        queues = dict.fromkeys((False, True), iter(_filled(draft)))
    return [[_fill(part, queues) for part in content] for content in contents]


def _filled(draft: ParsedRow, images: bool = True, videos: bool = True) -> list[Place]:
    chosen = [Place(False, one) for one in draft.images if images]
    return chosen + [Place(True, one) for one in draft.videos if videos]


def _fill(part: Part, queues: dict[bool, Iterator[Place]]) -> Part:
    return next(queues[part.video]) if isinstance(part, Place) and part.medium is None else part


def _check_count(markers: int, media: int, marker: str, noun: str, where: str) -> None:
    if markers != media:
        remedy = f"add the missing {noun} or remove markers"
        raise UserError(f"{where}: found {markers} {marker} markers but {media} {noun}; {remedy}")


def _located(medium: MediaRef, video: bool, locator: MediaResolver) -> Medium:
    return locator.video(medium.value, medium.where) if video else locator.image(medium.value, medium.where)


def _message(turn: Turn, content: Sequence[Part]) -> dict[str, Any]:
    message = {"role": turn.role, "content": [typed(part) for part in content]}
    return message if turn.loss else {**message, "loss": False}


def _rejected(draft: ParsedRow) -> list[dict[str, Any]] | None:
    """The messages of the worse answer, words alone: images belong to what both answer."""
    if draft.rejected is None:
        return None
    contents = [parse_content(turn.content, turn.where, False) for turn in draft.rejected]
    for turn, content in zip(draft.rejected, contents, strict=True):
        if any(isinstance(part, Place) for part in content):
            raise UserError(
                f"{turn.where}: found an image in the rejected answer, wanted words; move it to the prompt"
            )
    return [_message(turn, content) for turn, content in zip(draft.rejected, contents, strict=True)]
