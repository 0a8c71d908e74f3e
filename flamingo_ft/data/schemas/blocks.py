"""Content of a message, as text with markers or as typed blocks, to text and places of images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ft.data.fields import kind, text_field, whole
from flamingo_ft.errors import UserError
from flamingo_ft.model.tokens import MEDIA_TOKEN

from .draft import Given

VIDEO_MARKER = "<video>"
IMAGE_BLOCKS = ("image", "image_url")
VIDEO_BLOCKS = ("video", "video_url")
# Where a block keeps its image: TRL's and transformers' names, OpenAI's image_url.
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
VIDEO_KEYS = ("video", "video_url", "url", "path", "base64", "bytes")
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


def _block(block: Any, where: str) -> Part:
    if not isinstance(block, Mapping):
        raise UserError(f"{where}: found {kind(block)}, wanted a block of type text, image or video")
    form = block.get("type")
    if form == "text":
        return text_field(block, "text", where)
    if form not in (*IMAGE_BLOCKS, *VIDEO_BLOCKS):
        raise UserError(f"{where}.type: found {form!r}, wanted text, image or video")
    video = form in VIDEO_BLOCKS
    key = next((key for key in (VIDEO_KEYS if video else IMAGE_KEYS) if block.get(key) is not None), None)
    if form.endswith("_url") and key is None:
        raise UserError(f"{where}.{form}: found nothing, wanted a URL or a data: URI")
    return Place(video, Given(_medium(block[key], key), f"{where}.{key}") if key else None)


def _medium(value: Any, key: str) -> Any:
    """OpenAI wraps a URL in an object; base64 is told from a path by the key."""
    if key.endswith("_url") and isinstance(value, Mapping):
        return value.get("url")
    return f"data:;base64,{value}" if key == "base64" and isinstance(value, str) else value
