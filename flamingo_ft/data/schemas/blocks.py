"""Content of a message, as text with markers or as typed blocks, to text and places of images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.data.fields import has_content, is_blank, kind, text_field, whole
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

from .draft import Given
from .turn_keys import unread_block_texts

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
    medium: Given | None = None


Part = str | Place


def split_text(text: str, videos: bool = False) -> list[Part]:
    """Text in which each ``<image>`` is an image, and where a row has videos each ``<video>`` a video."""
    parts = (MARKERS if videos else IMAGE_MARKERS).split(text)
    places = {MEDIA_TOKEN: Place(), VIDEO_MARKER: Place(video=True)} if videos else {MEDIA_TOKEN: Place()}
    return [places.get(part, part) for part in parts if part]


def split_markers(text: str) -> list[dict[str, str]]:
    """Text as typed blocks, an image block for each ``<image>``."""
    return [typed(part) for part in split_text(text)]


def typed(part: Part) -> dict[str, str]:
    """A block as samples have it."""
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def read_content(content: Any, where: str, videos: bool) -> list[Part]:
    """A message's content. In typed blocks of text a marker is but text: the blocks say where images are."""
    if isinstance(content, str):
        parts = split_text(whole(content, where), videos)
    elif isinstance(content, list):
        parts = [_block(block, f"{where}[{index}]") for index, block in enumerate(content)]
    else:
        raise UserError(f"{where}: found {kind(content)}, wanted text or a list of typed blocks")
    if not any(isinstance(part, Place) or part.strip() for part in parts):
        raise UserError(f"{where}: found no words, wanted text or an image; remove the turn")
    return [part for part in parts if part != ""]


def unread_block_keys(content: Any, where: str) -> list[str]:
    """The keys of texts in typed blocks that nothing reads. UserError for those that are part of what was said."""
    blocks = content if isinstance(content, list) else []
    unread: dict[str, None] = {}
    for index, block in enumerate(blocks):
        if isinstance(block, Mapping):
            known = (*CONTENT_KEYS, "type")
            unread |= dict.fromkeys(unread_block_texts(block, known, f"{where}[{index}]"))
    return [*unread]


def _block(block: Any, where: str) -> Part:
    if not isinstance(block, Mapping):
        raise UserError(f"{where}: found {kind(block)}, wanted a block of type text, image or video")
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
    return Place(video, Given(_medium(block[key], key), f"{where}.{key}") if key else None)


def _check_alone(block: Mapping[str, Any], form: str, keys: Sequence[str], where: str) -> None:
    """Refuse a block with an image beside its text, text beside its image, or two images: one would be lost."""
    own = keys or ("text",)
    other = next(
        (key for key in block if key in CONTENT_KEYS and key not in own and has_content(block[key])), None
    )
    if other is not None:
        got = kind(block[other])
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
