"""Where a row's images and videos are: under the image root, at a URL if allowed, or in the row itself."""

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
from flamingo_ft.model.images import DATA_URI, decode_base64

from .fields import type_name
from .files import resolve_unicode
from .sample import Image, Video

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# How PNG, JPEG, GIF, WebP, BMP and TIFF begin in base64.
BASE64_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk0", "SUkqAA", "TU0AKg")
MIN_BASE64_CHARACTERS = 64  # a shorter text that begins like base64 is taken for a path
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
TIFF_MODES = ("CMYK", "F", "I", "I;16B", "LAB", "PA")


@dataclass(frozen=True)
class MediaResolver:
    """Turns images and videos as rows have them into paths, URLs and bytes; refuses what must not be read.

    root: folder that paths are relative to and must stay in, symbolic links resolved, or None.
    """

    root: Path | None
    allow_urls: bool

    @cached_property
    def _real_root(self) -> str:
        assert self.root is not None
        return os.path.realpath(self.root)

    @cached_property
    def _real_folders(self) -> dict[str, str]:
        """Image folders -> their real paths, cached because rows have many images in few folders."""
        return {}

    def image(self, value: Any, where: str) -> Image:
        """Resolve an image: path, URL, data URI or base64 text, bytes, {"bytes", "path"}, Pillow image."""
        return self._file(value, where, "an image")

    def video(self, value: Any, where: str) -> Video:
        """Resolve a video: a file in any of these forms, or a list of images, its frames."""
        if not isinstance(value, list):
            return Video(file=self._file(value, where, "a video"))
        if not value:
            raise UserError(f"{where}: expected at least one frame, got an empty list")
        return Video(
            frames=tuple(self.image(frame, f"{where}[{index}]") for index, frame in enumerate(value))
        )

    def _file(self, value: Any, where: str, noun: str) -> Image:
        if isinstance(value, PillowImage.Image):
            return _encoded_image(value, where)
        if isinstance(value, Mapping):
            value = _unwrapped(value)
        if isinstance(value, (bytes, bytearray)):
            return _nonempty(bytes(value), where, noun)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            raise UserError(f"{where}: expected the path of {noun}, got {type_name(value)}")
        return self._from_text(value, where, noun)

    def _from_text(self, text: str, where: str, noun: str) -> Image:
        if DATA_URI.match(text):
            return _nonempty(_decoded(text.partition(",")[2], where), where, noun)
        if len(text) >= MIN_BASE64_CHARACTERS and text.startswith(BASE64_BEGINNINGS):
            return _decoded(text, where)
        if SCHEME.match(text):
            return self._url(text, where)
        return self._path(text, where, noun)

    def _url(self, url: str, where: str) -> str:
        scheme = url.partition("://")[0].lower()
        if scheme not in ("http", "https"):
            raise UserError(
                f"{where}: expected a path inside image_root or an http(s) URL, got a URL of {scheme}:"
            )
        if not self.allow_urls:
            raise UserError(
                f"{where}: URLs are not fetched, got {shorten(url)}; set data.allow_urls to true to allow it"
            )
        return url

    def _path(self, text: str, where: str, noun: str) -> str:
        if self.root is None:
            raise UserError(
                f"{where}: no image_root, got the path {shorten(text)}; set it to the folder of the images"
            )
        path = self.root / text
        try:
            path = resolve_unicode(path)
            real = self._realpath(str(path))
        except (OSError, ValueError):  # a name that is too long, or has a null byte
            raise _not_found(path, where, noun) from None
        if not f"{real}{os.sep}".startswith(os.path.join(self._real_root, "")):
            remedy = "set image_root to a folder around all images"
            is_link = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(self.root))
            target = f", a link to {shorten(real)}" if is_link else ""
            raise UserError(f"{where}: outside of {self.root}, got {shorten(path)}{target}; {remedy}")
        if not os.path.isfile(path):
            raise _not_found(path, where, noun)
        return str(path)

    def _realpath(self, path: str) -> str:
        folder, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):
            return os.path.realpath(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        return os.path.join(self._real_folders[folder], name)


@images.reading()
def lossless_bytes(image: PillowImage.Image) -> bytes:
    """Encode an image as a file that is read back the same: PNG, or TIFF for modes that PNG lacks.

    Other modes (HSV, RGBX, premultiplied alpha; YCbCr, which Pillow 12 cannot read back) become RGB, as on
    reading. Of the metadata only the orientation is kept. Raises `images.UnreadableImage`.
    """
    images.check_size(*image.size)
    if image.mode not in (*PNG_MODES, *TIFF_MODES):
        return _saved(images.to_rgb(image), "PNG")
    exif = PillowImage.Exif()
    orientation = images.orientation(image)
    bare = image.copy()  # its own metadata would be written too, and may be damaged
    bare.info = {name: value for name, value in image.info.items() if name == "transparency"}
    if orientation != 1:
        exif[ORIENTATION] = orientation
    return _saved(bare, "PNG" if image.mode in PNG_MODES else "TIFF", exif=exif)


def _saved(image: PillowImage.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _encoded_image(image: PillowImage.Image, where: str) -> bytes:
    try:
        return lossless_bytes(image)
    except images.UnreadableImage as error:
        raise UserError(f"{where}: not a readable image ({error}); replace it") from None


def _not_found(path: Path, where: str, noun: str) -> UserError:
    return UserError(f"{where}: no such {noun.split()[1]} {shorten(path)}; check the path or set image_root")


def _unwrapped(value: Mapping) -> Any:
    """Return what an image or video of `datasets` holds; in JSON its bytes are base64."""
    content = value.get("bytes")
    if isinstance(content, str):
        return f"data:;base64,{content}"
    return value.get("path", value.get("url", dict(value))) if content is None else content


def _decoded(text: str, where: str) -> bytes:
    """Decode base64; line breaks in it are allowed."""
    try:
        return decode_base64(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}; expected an image file in base64") from None


def _nonempty(content: bytes, where: str, noun: str) -> bytes:
    if not content:
        raise UserError(f"{where}: expected {noun}, got an empty file")
    return content
