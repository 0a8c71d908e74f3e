"""Messages of a request to a dialogue in typed blocks, with its images in order."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .errors import RequestError, shown
from .images import ImageLink

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXT_BLOCKS = ("text", "input_text", "output_text")
IMAGE_BLOCKS = ("image_url", "input_image")
DETAILS = ("auto", "low", "high")  # a hint about cost: the tower has one resolution
SHOWN_NAME = 80  # characters of a key in errors
_MESSAGE_KEYS = ("role", "content", "type", "id", "status")


def read_messages(value: Any, field: str) -> tuple[list[dict[str, Any]], list[ImageLink]]:
    """Messages as the chat template takes them, and the images of their image blocks. Raises RequestError."""
    if not isinstance(value, list) or not value:
        raise RequestError(f"must be a list with at least one message, got {shown(value)}", field)
    images: list[ImageLink] = []
    return [_message(message, f"{field}[{index}]", images) for index, message in enumerate(value)], images


def _message(value: Any, field: str, images: list[ImageLink]) -> dict[str, Any]:
    kind = value.get("type", "message") if isinstance(value, dict) else None
    if kind != "message":
        raise RequestError(f"must be a message with role and content, got {shown(kind or value)}", field)
    _check_keys(value, field, _MESSAGE_KEYS)
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"must be system, user or assistant, got {shown(role)}", f"{field}.role")
    content = value.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise RequestError(
            f"must be a text or a list of content blocks, got {shown(content)}", f"{field}.content"
        )
    blocks = [_block(block, f"{field}.content[{index}]", role, images) for index, block in enumerate(content)]
    return {"role": ROLES[role], "content": blocks}


def _block(value: Any, field: str, role: str, images: list[ImageLink]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"must be an object with a type, got {shown(value)}", field)
    kind = value.get("type")
    if kind in TEXT_BLOCKS:
        _check_keys(value, field, ("type", "text"))
        if not isinstance(value.get("text"), str):
            raise RequestError(f"must be a text, got {shown(value.get('text'))}", f"{field}.text")
        return {"type": "text", "text": value["text"]}
    if kind not in IMAGE_BLOCKS:
        raise RequestError(f"must be text or image_url, got {shown(kind)}", f"{field}.type")
    if role != "user":
        raise RequestError(
            f"images belong in messages of the user, got one in a message of role {role}", field
        )
    _check_keys(value, field, ("type", "image_url", "detail"))
    images.append(_link(value, f"{field}.image_url"))
    return {"type": "image"}


def _link(block: dict[str, Any], field: str) -> ImageLink:
    """Where an image is: ``image_url`` is the URL, or an object that has it."""
    given = block.get("image_url")
    link = given if isinstance(given, dict) else {"url": given, "detail": block.get("detail")}
    _check_keys(link, field, ("url", "detail"))
    if not isinstance(link.get("url"), str) or not link["url"]:
        raise RequestError(f"must be a URL, got {shown(link.get('url'))}", field)
    if link.get("detail") not in (None, *DETAILS):
        raise RequestError(f"must be {', '.join(DETAILS)}, got {shown(link['detail'])}", f"{field}.detail")
    return ImageLink(link["url"], field)


def _check_keys(value: dict[str, Any], field: str, known: Collection[str]) -> None:
    """Reject what would be ignored; clients send empty values of keys that they do not use."""
    for key, content in value.items():
        if key not in known and content not in (None, [], {}, ""):
            raise RequestError("not supported by this server; leave it out", f"{field}.{key[:SHOWN_NAME]}")
