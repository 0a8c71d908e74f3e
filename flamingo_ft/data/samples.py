"""Instruction samples: dialogues with images, read from a file and checked row by row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flamingo_ft.errors import UserError
from flamingo_ft.model.tokens import MEDIA_TOKEN

from .sample import ROLES, UNNAMED_TASK, Sample


def read_samples(path: Path, image_root: Path | None = None) -> list[Sample]:
    """The samples of a JSON or JSONL file of rows with ``messages``, ``images`` and, where it has one, ``task``.

    Image paths start from ``image_root``, by default the file's folder. Raises UserError naming file, row
    (0-based, blank lines not counted) and field.
    """
    if not path.is_file():
        remedy = "check the path (a recipe's paths start from the recipe's folder)"
        raise UserError(f"{path}: no such data file; {remedy}")
    root = path.parent if image_root is None else image_root
    samples = [_sample(row, root, f"{path}: row {index}") for index, row in enumerate(_rows(path))]
    if not samples:
        raise UserError(f"{path}: found no rows; wanted at least one sample")
    return samples


def _rows(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows editors put first
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if path.suffix.lower() == ".json":
        rows = _parse(text, f"{path}", "a list of rows")
        if not isinstance(rows, list):
            raise UserError(f"{path}: found {_kind(rows)}, wanted a list of rows")
        yield from rows
        return
    lines = [line for line in text.split("\n") if line.strip()]
    for index, line in enumerate(lines):
        yield _parse(line, f"{path}: row {index}", "one object a line")


def _parse(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at character {error.pos}); wanted {wanted}") from None


def _sample(row: Any, root: Path, where: str) -> Sample:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: found {_kind(row)}, wanted an object with messages and images")
    if "image" in row:
        raise UserError(f"{where}: image: no such field; wanted images, a list of paths")
    messages = _field(row, "messages", list, where)
    images = _field(row, "images", list, where) if row.get("images") is not None else []
    messages = _messages(messages, len(images), where)
    paths = [_image_path(image, root, f"{where}: images[{index}]") for index, image in enumerate(images)]
    task = _field(row, "task", str, where) if row.get("task") is not None else ""
    return Sample(messages, paths, task or UNNAMED_TASK, where)


def _messages(messages: list, images: int, where: str) -> list[dict[str, Any]]:
    """Messages in typed blocks, one image block for each image."""
    for index, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{index}]")
    _check_roles([message["role"] for message in messages], f"{where}: messages")
    blocks = [_blocks(m["content"], f"{where}: messages[{i}].content") for i, m in enumerate(messages)]
    markers = sum(block["type"] == "image" for content in blocks for block in content)
    if markers == 0 and images:
        _put_first(messages, blocks, images)
    elif markers != images:
        raise UserError(
            f"{where}: found {markers} {MEDIA_TOKEN} markers but {images} images; "
            "add the missing images or remove markers"
        )
    return [{"role": m["role"], "content": content} for m, content in zip(messages, blocks, strict=True)]


def _put_first(messages: list, blocks: list[list], images: int) -> None:
    """Images that the text gives no place stand before the first user turn, as in TRL."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    blocks[first] = [{"type": "image"}] * images + blocks[first]


def _check_roles(roles: list[str], where: str) -> None:
    if "assistant" not in roles:
        raise UserError(f"{where}: found no assistant turn, wanted one to learn from")
    if roles[0] == "assistant":
        raise UserError(f"{where}: found an assistant turn first, wanted what it answers before it")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: found {_kind(message)}, wanted an object with role and content")
    lacking = [name for name in ("role", "content") if name not in message]
    if lacking:
        raise UserError(f"{where}: found no {lacking[0]}, wanted an object with role and content")
    if message["role"] not in ROLES:
        raise UserError(f"{where}.role: found {message['role']!r}, wanted one of {', '.join(ROLES)}")


def _blocks(content: Any, where: str) -> list[dict[str, str]]:
    """Content as typed blocks; in a plain string each ``<image>`` is an image."""
    if isinstance(content, str):
        return split_markers(_whole(content, where))
    if not isinstance(content, list):
        raise UserError(f"{where}: found {_kind(content)}, wanted text or a list of typed blocks")
    return [_block(block, f"{where}[{index}]") for index, block in enumerate(content)]


def split_markers(text: str) -> list[dict[str, str]]:
    """Text as typed blocks, an image block for each ``<image>``."""
    first, *rest = text.split(MEDIA_TOKEN)
    blocks = [{"type": "text", "text": first}]
    for part in rest:
        blocks += [{"type": "image"}, {"type": "text", "text": part}]
    return [block for block in blocks if block.get("text") != ""]


def _block(block: Any, where: str) -> dict[str, str]:
    if not isinstance(block, Mapping):
        raise UserError(f"{where}: found {_kind(block)}, wanted a block of type text or image")
    if block.get("type") not in ("text", "image"):
        raise UserError(f"{where}.type: found {block.get('type')!r}, wanted text or image")
    if block["type"] == "image":
        return {"type": "image"}
    text = _field(block, "text", str, where)
    if MEDIA_TOKEN in text:
        remedy = "use a block of type image in its place"
        raise UserError(f"{where}.text: found {MEDIA_TOKEN} inside text; {remedy}")
    return {"type": "text", "text": text}


def _image_path(image: Any, root: Path, where: str) -> str:
    if not isinstance(image, str):
        raise UserError(f"{where}: found {_kind(image)}, wanted the path of an image")
    path = root / image
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long, such as base64 data
        raise UserError(f"{where}: no such image {_shortened(path)}; check the path or set image_root")
    return str(path)


def _field(row: Mapping, name: str, kind: type, where: str) -> Any:
    if not isinstance(row.get(name), kind):
        found = _kind(row[name]) if name in row else "no such field"
        raise UserError(f"{where}: {name}: found {found}, wanted {_NAMES[kind]}")
    return _whole(row[name], f"{where}: {name}") if kind is str else row[name]


def _whole(text: str, where: str) -> str:
    """The text, refused where JSON escapes made half a character of it, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: found half a character at {error.start}, wanted whole text; remove it") from None
    return text


def _shortened(path: Path) -> str:
    """The path on one line, and its beginning alone where it is no path but data."""
    text = str(path).replace("\n", "\\n")
    return text if len(text) <= 300 else f"{text[:300]}..."


_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)
