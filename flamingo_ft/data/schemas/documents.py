"""Text that is gone on with, not answered: captions and interleaved documents."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.data.fields import (
    TAR_MEMBERS,
    Row,
    has_value,
    list_field,
    nonempty_text,
    text_field,
    type_name,
)
from flamingo_ft.data.files import same_name
from flamingo_ft.data.sample import DOCUMENT
from flamingo_ft.errors import UserError

from .schema import MediaRef, ParsedRow, Turn, images_of, videos_of

CAPTION_FIELDS = ("caption", "text", "captions", "label")


def read_caption(row: Row, where: str) -> ParsedRow:
    """An image and what it shows: ``caption``, ``text``, the first of ``captions``, or the ``label`` of its folder."""
    images, videos = images_of(row, where), videos_of(row, where)
    if not images and not videos:
        raise UserError(f"{where}: found no image, wanted one in image, images or video")
    name = caption_field(row)
    if name is None:
        raise UserError(f"{where}: found no caption, wanted text in {', '.join(CAPTION_FIELDS)}")
    captions = list_field(row, name, where) if name == "captions" else [row[name]]
    if not captions:
        raise UserError(f"{where}: captions: found an empty list, wanted at least one caption")
    place = f"{where}: captions[0]" if name == "captions" else f"{where}: {name}"
    blocks = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    turn = Turn(DOCUMENT, [*blocks, _text(nonempty_text(captions[0], place))], place)
    return ParsedRow([turn], images, videos)


def caption_field(row: Row) -> str | None:
    """The one field that the caption is read from."""
    return next((name for name in CAPTION_FIELDS if has_value(row, name)), None)


def read_interleaved(row: Row, where: str) -> ParsedRow:
    """MMC4's text_list and image_info, or OBELICS' texts and images side by side."""
    read = _read_mmc4 if has_value(row, "text_list") else _read_obelics
    blocks, images = read(row, where)
    if not any(block["type"] == "text" for block in blocks):
        raise UserError(f"{where}: found no words, wanted a document with text")
    return ParsedRow([Turn(DOCUMENT, blocks, where)], images)


def _read_mmc4(row: Row, where: str) -> tuple[list[dict], list[MediaRef]]:
    """Each image before the text that it was matched with, as OpenFlamingo was trained."""
    texts = list_field(row, "text_list", where)
    infos = list_field(row, "image_info", where) if has_value(row, "image_info") else []
    matched = [
        _matched(info, len(texts), f"{where}: image_info[{index}]") for index, info in enumerate(infos)
    ]
    blocks, images = [], []
    for index, text in enumerate(texts):
        for number in (number for number, text_index in enumerate(matched) if text_index == index):
            blocks.append({"type": "image"})
            images.append(_picture(infos[number], row, f"{where}: image_info[{number}]"))
        blocks.append(_text(nonempty_text(text, f"{where}: text_list[{index}]")))
    return blocks, images


def _matched(info: Any, texts: int, where: str) -> int:
    if not isinstance(info, Mapping):
        raise UserError(
            f"{where}: found {type_name(info)}, wanted an object with matched_text_index and an image"
        )
    index = info.get("matched_text_index")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < texts:
        found = index if isinstance(index, int) else type_name(index)
        raise UserError(
            f"{where}.matched_text_index: found {found}, wanted the number of one of {texts} texts, from 0"
        )
    return index


def _picture(info: Mapping, row: Row, where: str) -> MediaRef:
    """The image in the row itself, in a file of its tar, in a file under image_root, or at its URL."""
    if has_value(info, "image_base64"):
        return MediaRef(f"data:;base64,{text_field(info, 'image_base64', where)}", f"{where}.image_base64")
    if has_value(info, "image_name"):
        name = text_field(info, "image_name", where)
        members = row.get(TAR_MEMBERS) or {}
        found = next((data for member, data in members.items() if _is_named(member, name)), name)
        return MediaRef(found, f"{where}.image_name")
    url = next((key for key in ("raw_url", "url") if has_value(info, key)), None)
    if url is None:
        raise UserError(f"{where}: found no image, wanted image_base64, image_name or raw_url")
    return MediaRef(info[url], f"{where}.{url}")


def _is_named(member: str, name: str) -> bool:
    """Whether a file of a tar has this name, or has it after the key that all files of a row begin with."""
    file = os.path.basename(member)
    return any(same_name(name, one) for one in (member, file, file.partition(".")[2]))


def _read_obelics(row: Row, where: str) -> tuple[list[dict], list[MediaRef]]:
    texts, pictures = list_field(row, "texts", where), list_field(row, "images", where)
    if len(texts) != len(pictures):
        counts = f"{len(texts)} texts and {len(pictures)} images"
        raise UserError(
            f"{where}: found {counts}, wanted lists of one length with null where the other has something"
        )
    blocks, images = [], []
    for index, pair in enumerate(zip(texts, pictures, strict=True)):
        _check_one_of(pair, index, where)
        text, picture = pair
        if text is None:
            blocks.append({"type": "image"})
            images.append(MediaRef(picture, f"{where}: images[{index}]"))
        else:
            blocks.append(_text(nonempty_text(text, f"{where}: texts[{index}]")))
    return blocks, images


def _check_one_of(pair: Sequence[Any], index: int, where: str) -> None:
    present = sum(value is not None for value in pair)
    if present != 1:
        found = "both a text and an image" if present else "neither text nor image"
        raise UserError(
            f"{where}: texts[{index}]: found {found}, wanted one of them and null in the other list"
        )


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
