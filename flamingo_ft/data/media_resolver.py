"""Where a row's images and videos are: inside the image root, on the network when allowed, or in the row itself."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import shorten
from flamingo_ft.model import images
from flamingo_ft.model.image_metadata import ORIENTATION
from flamingo_ft.model.image_source import DATA_URI, decode_base64

from .fields import type_name
from .files import resolve_unicode
from .sample import Image, Video

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# How PNG, JPEG, GIF, WebP, BMP and TIFF begin in base64.
BASE64_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk0", "SUkqAA", "TU0AKg")
SHORTEST_BASE64 = 64  # characters; below, a text that begins like one is taken for a path
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
TIFF_MODES = ("CMYK", "F", "I", "I;16B", "LAB", "PA", "YCbCr")


@dataclass(frozen=True)
class MediaResolver:
    """Turns images and videos as rows have them into paths, URLs and bytes, and refuses what must not be read.

    root: the folder that paths start from and stay in, symbolic links followed; None where there is none.
    """

    root: Path | None
    allow_urls: bool

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root)

    def image(self, value: Any, where: str) -> Image:
        """An image: path, URL, data URI or base64 text, bytes, {"bytes", "path"}, or a Pillow image."""
        return self._file(value, where, "an image")

    def video(self, value: Any, where: str) -> Video:
        """A video file, in the same forms, or a list of images, its frames."""
        if not isinstance(value, list):
            return Video(file=self._file(value, where, "a video"))
        if not value:
            raise UserError(f"{where}: found no frames, wanted at least one image")
        return Video(
            frames=tuple(self.image(frame, f"{where}[{index}]") for index, frame in enumerate(value))
        )

    def _file(self, value: Any, where: str, noun: str) -> Image:
        if isinstance(value, PillowImage.Image):
            return _kept(value, where)
        if isinstance(value, Mapping):
            value = _inside(value)
        if isinstance(value, (bytes, bytearray)):
            return _not_empty(bytes(value), where, noun)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            raise UserError(f"{where}: found {type_name(value)}, wanted the path of {noun}")
        return self._named(value, where, noun)

    def _named(self, text: str, where: str, noun: str) -> Image:
        if DATA_URI.match(text):
            return _not_empty(_decoded(text.partition(",")[2], where), where, noun)
        if len(text) >= SHORTEST_BASE64 and text.startswith(BASE64_BEGINNINGS):
            return _decoded(text, where)
        if SCHEME.match(text):
            return self._url(text, where)
        return self._path(text, where, noun)

    def _url(self, url: str, where: str) -> str:
        scheme = url.partition("://")[0].lower()
        if scheme not in ("http", "https"):
            raise UserError(f"{where}: found a URL of {scheme}:, wanted a path inside image_root, or http(s)")
        if not self.allow_urls:
            raise UserError(f"{where}: found the URL {shorten(url)}; set data.allow_urls to true to fetch it")
        return url

    def _path(self, text: str, where: str, noun: str) -> str:
        if self.root is None:
            raise UserError(
                f"{where}: found the path {shorten(text)}; set image_root to the folder it starts from"
            )
        path = self.root / text
        try:
            path = resolve_unicode(path)
            inside = Path(os.path.realpath(path)).is_relative_to(self._real_root)
        except (OSError, ValueError):  # a name too long, or with a null byte
            raise _not_there(path, where, noun) from None
        if not inside:
            remedy = "set image_root to a folder around all images"
            raise UserError(f"{where}: found {shorten(path)}, which leads out of {self.root}; {remedy}")
        if not os.path.isfile(path):
            raise _not_there(path, where, noun)
        return str(path)


@images.reading()
def lossless_bytes(image: PillowImage.Image) -> bytes:
    """The image as a file that the reader reads as it reads the image: PNG, or TIFF where PNG has no such pixels.

    A mode that neither has (HSV, RGBX, premultiplied alpha) is kept as the RGB that the reader makes of it. Of the
    metadata only the orientation stays. Raises `images.UnreadableImage`.
    """
    images.check_size(*image.size)
    if image.mode not in (*PNG_MODES, *TIFF_MODES):
        return _saved(images.to_rgb(image), "PNG")
    exif = PillowImage.Exif()
    orientation = images.orientation(image)
    bare = image.copy()  # a file's own metadata would be written too, and may be damaged
    bare.info = {name: value for name, value in image.info.items() if name == "transparency"}
    if orientation != 1:
        exif[ORIENTATION] = orientation
    return _saved(bare, "PNG" if image.mode in PNG_MODES else "TIFF", exif=exif)


def _saved(image: PillowImage.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _kept(image: PillowImage.Image, where: str) -> bytes:
    try:
        return lossless_bytes(image)
    except images.UnreadableImage as error:
        raise UserError(f"{where}: not a readable image ({error}); replace it") from None


def _not_there(path: Path, where: str, noun: str) -> UserError:
    return UserError(f"{where}: no such {noun.split()[1]} {shorten(path)}; check the path or set image_root")


def _inside(value: Mapping) -> Any:
    """What a `datasets` image or video holds; JSON has its bytes as base64."""
    content = value.get("bytes")
    if isinstance(content, str):
        return f"data:;base64,{content}"
    return value.get("path", value.get("url", dict(value))) if content is None else content


def _decoded(text: str, where: str) -> bytes:
    """The bytes that base64 stands for; line breaks in it are no fault."""
    try:
        return decode_base64(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}; wanted an image's file in base64") from None


def _not_empty(content: bytes, where: str, noun: str) -> bytes:
    if not content:
        raise UserError(f"{where}: found an empty file, wanted {noun}")
    return content
