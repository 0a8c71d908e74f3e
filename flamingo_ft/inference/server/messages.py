"""Messages of a request, as a dialogue in typed blocks, and the images that they link to."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from PIL.Image import Image

from flamingo_ft.errors import UserError
from flamingo_ft.model.download import download, is_url
from flamingo_ft.model.images import UnreadableImage, open_image

from .errors import RequestError, shown

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXT_BLOCKS = ("text", "input_text", "output_text")
IMAGE_BLOCKS = ("image_url", "input_image")
DETAILS = ("auto", "low", "high")  # accepted without effect: the tower has one resolution
MAX_KEY_CHARACTERS = 80  # of a key in errors
_MESSAGE_KEYS = ("role", "content", "type", "id", "status")
DATA_URL_HINT = "send the image as data:image/png;base64,..."


@dataclass(frozen=True)
class ImageLink:
    """An image's URL, and the field of the request that has it."""

    url: str
    field: str


@dataclass(frozen=True)
class MediaPolicy:
    """Where images may come from besides the request itself.

    folder: local files in this folder; None: no local files. urls: http(s) URLs of public addresses, of any
    address, including the server's own network, or none.
    """

    folder: Path | None = None
    urls: Literal["public", "any", "none"] = "public"


def read_messages(value: Any, field: str) -> tuple[list[dict[str, Any]], list[ImageLink]]:
    """Return messages as the chat template takes them, and the links of their images. Raise RequestError."""
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
            f"must be a string or a list of content blocks, got {shown(content)}", f"{field}.content"
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
            raise RequestError(f"must be a string, got {shown(value.get('text'))}", f"{field}.text")
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
    """Return the link of an image block: ``image_url`` is the URL, or an object that has it."""
    value = block.get("image_url")
    link = value if isinstance(value, dict) else {"url": value, "detail": block.get("detail")}
    _check_keys(link, field, ("url", "detail"))
    if not isinstance(link.get("url"), str) or not link["url"]:
        raise RequestError(f"must be a URL, got {shown(link.get('url'))}", field)
    if link.get("detail") not in (None, *DETAILS):
        raise RequestError(f"must be {', '.join(DETAILS)}, got {shown(link['detail'])}", f"{field}.detail")
    return ImageLink(link["url"], field)


def _check_keys(value: dict[str, Any], field: str, known: Collection[str]) -> None:
    """Reject keys that would be ignored, unless they are empty: clients send those without using them."""
    for key, content in value.items():
        if key not in known and content not in (None, [], {}, ""):
            raise RequestError(
                "not supported by this server; leave it out", f"{field}.{key[:MAX_KEY_CHARACTERS]}"
            )


def open_link(link: ImageLink, policy: MediaPolicy) -> Image:
    """Return the image as RGB. Raise RequestError if it is not allowed or cannot be read."""
    content = _read_link(link, policy)
    try:
        return open_image(content)
    except UnreadableImage as error:
        raise RequestError(f"not a readable image ({error})", link.field) from None


def _read_link(link: ImageLink, policy: MediaPolicy) -> bytes | Path:
    scheme, colon, _ = link.url.partition(":")
    if colon and scheme.lower() == "data":
        return _decode_data_url(link)
    if is_url(link.url):
        return _download(link, policy)
    if "://" in link.url and scheme.lower() != "file":
        raise RequestError(f"must be a data: or http(s) URL, got {shown(link.url)}", link.field)
    return _local_file(link, policy)


def _decode_data_url(link: ImageLink) -> bytes:
    header, comma, data = link.url.partition(",")
    if not comma or not header.lower().rstrip().endswith(";base64"):
        raise RequestError(f"must be data:image/TYPE;base64,DATA, got {shown(link.url)}", link.field)
    try:
        return base64.b64decode("".join(unquote(data).split()), validate=True)
    except ValueError as error:
        raise RequestError(f"the data is not valid base64 ({error})", link.field) from None


def _download(link: ImageLink, policy: MediaPolicy) -> bytes:
    if policy.urls == "none":
        raise RequestError(f"this server fetches no URLs; {DATA_URL_HINT}", link.field)
    try:
        return download(link.url, link.field, public_only=policy.urls == "public")
    except UserError as error:
        raise RequestError(str(error).removeprefix(f"{link.field}: "), link.field) from None


def _local_file(link: ImageLink, policy: MediaPolicy) -> Path:
    """Return a file in the allowed folder; the error does not reveal whether a file elsewhere exists."""
    if policy.folder is None:
        raise RequestError(
            f"must be a data: or http(s) URL, got {shown(link.url)}; "
            "local files are read only where the server was started with --allowed-media",
            link.field,
        )
    outside = RequestError(f"not a file in the folder of --allowed-media, got {shown(link.url)}", link.field)
    try:
        folder = policy.folder.resolve(strict=True)
        path = (folder / _url_path(link.url)).resolve()
        allowed = path.is_relative_to(folder) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, a null byte, a loop of links
        raise outside from None
    if not allowed:
        raise outside
    return path


def _url_path(url: str) -> str:
    if url.lower().startswith("file:"):
        parts = urlsplit(url)
        return unquote(parts.path) if parts.netloc in ("", "localhost") else "//"
    return url
