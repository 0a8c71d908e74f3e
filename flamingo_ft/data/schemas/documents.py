"""Text that the model continues instead of answering: captions, and documents with interleaved images."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flamingo_ft.data.fields import (
    TAR_MEMBERS,
    Row,
    has_value,
    list_field,
    nonempty_text,
    text_field,
    type_name,
    usable_texts,
)
from flamingo_ft.data.files import same_name
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.errors import UserError

from .schema import MEDIA_FIELDS, MediaRef, ParsedRow, Schema, Turn, images_of, register_schema, videos_of

CAPTION_FIELDS = ("caption", "text", "captions", "label")

Block = dict[str, str]


def parse_caption(row: Row, where: str) -> ParsedRow:
    """Parse an image and its caption: ``caption``, ``text``, the first of ``captions``, or ``label``.

    All of ``captions`` are reference answers of evaluation.
    """
    images, videos = images_of(row, where), videos_of(row, where)
    if not images and not videos:
        raise UserError(f"{where}: no image; give one in image, images or video")
    name = caption_field(row)
    if name is None:
        raise UserError(f"{where}: no caption; give text in {', '.join(CAPTION_FIELDS)}")
    if name == "captions":
        captions, place = list_field(row, name, where), f"{where}: captions[0]"
        if not captions:
            raise UserError(f"{where}: captions: expected at least one caption, got an empty list")
        caption, others = captions[0], usable_texts(captions[1:])
    else:
        caption, others, place = row[name], [], f"{where}: {name}"
    media: list[Block] = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    turn = Turn(DOCUMENT, [*media, _text_block(nonempty_text(caption, place))], place)
    return ParsedRow([turn], images, videos, other_answers=others)


def caption_field(row: Row) -> str | None:
    """Return the one field that the caption is read from."""
    return next((name for name in CAPTION_FIELDS if has_value(row, name)), None)


def parse_interleaved(row: Row, where: str) -> ParsedRow:
    """Parse MMC4's text_list and image_info, or OBELICS' parallel texts and images."""
    parse = _parse_mmc4 if has_value(row, "text_list") else _parse_obelics
    blocks, images = parse(row, where)
    if not any(block["type"] == "text" for block in blocks):
        raise UserError(f"{where}: the document has no text; remove the row")
    return ParsedRow([Turn(DOCUMENT, blocks, where)], images)


def _parse_mmc4(row: Row, where: str) -> tuple[list[Block], list[MediaRef]]:
    """Place each image before the text it is matched with, as OpenFlamingo was trained."""
    texts = list_field(row, "text_list", where)
    infos = list_field(row, "image_info", where) if has_value(row, "image_info") else []
    places = [f"{where}: image_info[{index}]" for index in range(len(infos))]
    matched = [_text_index(info, len(texts), place) for info, place in zip(infos, places, strict=True)]
    blocks: list[Block] = []
    images: list[MediaRef] = []
    for index, text in enumerate(texts):
        for info, place, text_index in zip(infos, places, matched, strict=True):
            if text_index == index:
                blocks.append({"type": "image"})
                images.append(_mmc4_image(info, row, place))
        blocks.append(_text_block(nonempty_text(text, f"{where}: text_list[{index}]")))
    return blocks, images


def _text_index(info: Any, texts: int, where: str) -> int:
    if not isinstance(info, Mapping):
        raise UserError(
            f"{where}: expected an object with matched_text_index and an image, got {type_name(info)}"
        )
    index = info.get("matched_text_index")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < texts:
        got = index if isinstance(index, int) else type_name(index)
        raise UserError(
            f"{where}.matched_text_index: expected the index of one of {texts} texts, from 0, got {got}"
        )
    return index


def _mmc4_image(info: Mapping, row: Row, where: str) -> MediaRef:
    """Return the image: in the row itself, a file of its tar, a file under image_root, or a URL."""
    if has_value(info, "image_base64"):
        return MediaRef(f"data:;base64,{text_field(info, 'image_base64', where)}", f"{where}.image_base64")
    if has_value(info, "image_name"):
        name = text_field(info, "image_name", where)
        members = row.get(TAR_MEMBERS) or {}
        value = next((data for member, data in members.items() if _is_named(member, name)), name)
        return MediaRef(value, f"{where}.image_name")
    url = next((key for key in ("raw_url", "url") if has_value(info, key)), None)
    if url is None:
        raise UserError(f"{where}: no image; give image_base64, image_name or raw_url")
    return MediaRef(info[url], f"{where}.{url}")


def _is_named(member: str, name: str) -> bool:
    """Whether a file of a tar has this name, with or without the sample's key in front."""
    file = os.path.basename(member)
    return any(same_name(name, candidate) for candidate in (member, file, file.partition(".")[2]))


def _parse_obelics(row: Row, where: str) -> tuple[list[Block], list[MediaRef]]:
    texts, pictures = list_field(row, "texts", where), list_field(row, "images", where)
    if len(texts) != len(pictures):
        raise UserError(
            f"{where}: expected texts and images as lists of equal length, exactly one of the two non-null "
            f"at each index, got {len(texts)} texts and {len(pictures)} images"
        )
    blocks: list[Block] = []
    images: list[MediaRef] = []
    for index, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        if (text is None) == (picture is None):
            got = "neither text nor image" if text is None else "both a text and an image"
            raise UserError(f"{where}: texts[{index}]: expected null in one of texts and images, got {got}")
        if text is None:
            blocks.append({"type": "image"})
            images.append(MediaRef(picture, f"{where}: images[{index}]"))
        else:
            blocks.append(_text_block(nonempty_text(text, f"{where}: texts[{index}]")))
    return blocks, images


def _text_block(text: str) -> Block:
    return {"type": "text", "text": text}


def _is_caption(row: Row) -> bool:
    has_media = any(name in row for name in MEDIA_FIELDS)
    return has_media and any(name in row for name in CAPTION_FIELDS)


def _is_interleaved(row: Row) -> bool:
    return "text_list" in row or isinstance(row.get("texts"), list)


register_schema(
    Schema("caption", fields=CAPTION_FIELDS, matches=_is_caption, parse=parse_caption, selects=caption_field)
)
register_schema(
    Schema(
        "interleaved",
        fields=("text_list", "image_info", "texts"),
        matches=_is_interleaved,
        parse=parse_interleaved,
    )
)
