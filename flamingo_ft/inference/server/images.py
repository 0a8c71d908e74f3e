"""The image behind an ``image_url``, from the places that the server allows."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from PIL.Image import Image

from flamingo_ft.errors import UserError
from flamingo_ft.model.download import download, is_url
from flamingo_ft.model.images import UnreadableImage, open_image

from .errors import RequestError, shown

IN_THE_REQUEST = "send the image as data:image/png;base64,..."


@dataclass(frozen=True)
class ImageLink:
    """An image's URL, and the field of the request that it stands in."""

    url: str
    field: str


@dataclass(frozen=True)
class MediaPolicy:
    """Where images may come from besides the request itself.

    folder: local files in it, and nowhere else. urls: http(s) from public addresses, from any address (of the server's
    own network too), or from none.
    """

    folder: Path | None = None
    urls: Literal["public", "any", "none"] = "public"


def open_link(link: ImageLink, policy: MediaPolicy) -> Image:
    """The image as RGB. Raises RequestError for one that is not allowed, cannot be fetched, or cannot be read."""
    content = _content(link, policy)
    try:
        return open_image(content)
    except UnreadableImage as error:
        raise RequestError(f"not a readable image ({error})", link.field) from None


def _content(link: ImageLink, policy: MediaPolicy) -> bytes | Path:
    scheme, colon, _ = link.url.partition(":")
    if colon and scheme.lower() == "data":
        return _embedded(link)
    if is_url(link.url):
        return _fetched(link, policy)
    if "://" in link.url and scheme.lower() != "file":
        raise RequestError(f"must be a data: or http(s) URL, got {shown(link.url)}", link.field)
    return _local(link, policy)


def _embedded(link: ImageLink) -> bytes:
    header, comma, data = link.url.partition(",")
    if not comma or not header.lower().rstrip().endswith(";base64"):
        raise RequestError(f"must be data:image/TYPE;base64,DATA, got {shown(link.url)}", link.field)
    try:
        return base64.b64decode("".join(unquote(data).split()), validate=True)
    except ValueError as error:
        raise RequestError(f"the data is not valid base64 ({error})", link.field) from None


def _fetched(link: ImageLink, policy: MediaPolicy) -> bytes:
    if policy.urls == "none":
        raise RequestError(f"this server fetches no URLs; {IN_THE_REQUEST}", link.field)
    try:
        return download(link.url, link.field, public_only=policy.urls == "public")
    except UserError as error:
        raise RequestError(str(error).removeprefix(f"{link.field}: "), link.field) from None


def _local(link: ImageLink, policy: MediaPolicy) -> Path:
    """A file in the allowed folder; the answer is the same whether a file elsewhere exists or not."""
    if policy.folder is None:
        raise RequestError(
            f"must be a data: or http(s) URL, got {shown(link.url)}; "
            "local files are read only where the server was started with --allowed-media",
            link.field,
        )
    outside = RequestError(f"not a file in the folder of --allowed-media, got {shown(link.url)}", link.field)
    try:
        folder = policy.folder.resolve(strict=True)
        path = (folder / _path(link.url)).resolve()
        allowed = path.is_relative_to(folder) and path.is_file()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a name that is too long, has a null byte, is a loop of links
        raise outside from None
    if not allowed:
        raise outside
    return path


def _path(url: str) -> str:
    if url.lower().startswith("file:"):
        parts = urlsplit(url)
        return unquote(parts.path) if parts.netloc in ("", "localhost") else "//"
    return url
