"""Read images as callers of the processor pass them: path, URL, data URI, base64, bytes, Pillow image or
array.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import shorten

from .download import download, is_url
from .images import UnreadableImage, open_image, to_rgb

DATA_URI = re.compile(r"data:[^,]{0,200},")


def read_image(source: Any) -> Image.Image:
    """Read an image in any of these forms as upright RGB. UserError if it cannot be read or fetched."""
    if isinstance(source, Mapping):  # an undecoded image of `datasets`
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    name = _name(source)
    try:
        if isinstance(source, str):
            source = _content(source)
        if isinstance(source, (bytes, bytearray)):
            return open_image(bytes(source))
        return open_image(source) if isinstance(source, (str, os.PathLike)) else to_rgb(source)
    except UnreadableImage as error:
        raise UserError(f"{name}: not a readable image ({error}); replace it") from None


def decode_base64(text: str) -> bytes:
    """Decode base64 text, line breaks allowed. ValueError for other text."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64 ({error})") from None


def _content(text: str) -> str | bytes:
    """Return the bytes behind a URL, a data URI or base64 text; a path is returned as it is."""
    if is_url(text):
        return download(text, "image")
    if os.path.isfile(text):
        return text
    uri = DATA_URI.match(text)
    try:
        return decode_base64(text[uri.end() :] if uri else text)
    except ValueError as error:
        raise UnreadableImage(str(error) if uri else "no such file, and not a URL or base64") from None


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return shorten(source)
    return f"{len(source)} bytes" if isinstance(source, (bytes, bytearray)) else "image"
