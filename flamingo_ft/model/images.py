"""The one image reader: from a file, URL, base64 text, Pillow image or array to upright 8-bit RGB.

Training, evaluation, the processor (and with it pipelines, the server and TRL), reports and checks all read
images here, so that a report shows what the model sees.

- The orientation in EXIF or XMP is applied. Damaged metadata is ignored and never makes an image unreadable.
- Transparent pixels are composited over white: the colours hidden under them were never meant to be seen.
- 16-bit, 32-bit and float values are scaled to 0..255 (`image_values.eight_bit` has the rule).
- Palette, CMYK, YCbCr, LAB and HSV become RGB as Pillow converts them; colour profiles are ignored.
- Of a file with several frames the first is read; of an open Pillow image, the current one.

The conversions made are in the image's ``info["conversions"]``, as names of `CONVERSIONS`.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import struct
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message, shorten

from .download import download, is_url
from .image_metadata import METADATA_ERRORS, ORIENTATION, split_metadata, stored_orientation
from .image_values import channels_last, colours_to_rgb, eight_bit

READER_VERSION = 2  # increment it when a file is read into other pixels: feature caches depend on it
MAX_PIXELS = 89_478_485  # of one image or video frame; 256 MiB of RGB
# Pillow opens more formats, some by starting other programs (EPS); training data does not use them.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
# Exceptions that Pillow's decoders have been seen to raise for damaged files and files that are not images.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    RuntimeError,
    EOFError,
    ArithmeticError,
    AssertionError,
    LookupError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_EMPTY_EXIF = 20  # bytes of an EXIF block without entries
NOTES = "conversions"  # key in an image's info
CONVERSIONS = {
    "16-bit": "0..65,535 scaled to 0..255",
    "32-bit integer": "scaled by the smallest of 255 and 65,535 that the image does not exceed",
    "float": "scaled by the smallest of 1, 255 and 65,535 that the image does not exceed",
    "scaled by its own maximum": "values beyond 65,535: the image's largest value is white",
    "clipped": "values a little below zero and NaN are black, values beyond white are white",
    "transparent": "drawn over white",
    "palette": "colours of the palette",
    "greyscale": "the same value in red, green and blue",
    "black and white": "one bit: 0 or 255",
    "CMYK": "to RGB, without the colour profile",
    "other colour space": "YCbCr, LAB or HSV to RGB",
    "rotated": "turned upright as EXIF or XMP says",
    "first frame": "later frames or pages are not read",
    "damaged metadata": "ignored, except for an orientation that can still be read",
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
DATA_URI = re.compile(r"data:[^,]{0,200},")


class UnreadableImage(ValueError):
    """No image can be read from the input; the message says why in a few words."""


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Read an image file from its path or its content.

    Raises UnreadableImage for damaged files, for other formats, and for more than `MAX_PIXELS` pixels,
    without decoding them.
    """
    try:
        return _read(source)
    except UnreadableImage:
        raise
    except UNREADABLE as error:
        repaired = _read_without_metadata(source)
        if repaired is None:
            raise UnreadableImage(_reason(error, source)) from None
        return repaired


def upright_size(source: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Return the width and height of what `open_image` reads; a JPEG file is not decoded for it.

    Raises UnreadableImage as `open_image` does.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with _quiet(), Image.open(file, formats=["JPEG"]) as image:
            (turn, damaged), size = _stored_orientation(image), image.size
        if image.format == "JPEG" and not damaged:
            return (size[1], size[0]) if turn in _SIDEWAYS else size
    except UNREADABLE:
        pass  # another format, or damaged: the whole reader decides
    return open_image(source).size


def to_rgb(image: Any) -> Image.Image:
    """Convert a Pillow image, a numpy array or a torch tensor; the input is not changed.

    Arrays are (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4 channels (grey, RGB, RGBA), of bool,
    integers, or floats in 0..1 or 0..255. Raises UnreadableImage for other shapes and values, such as batches
    and normalized pixels.
    """
    if isinstance(image, Image.Image) and image.mode == "RGB" and _is_read(image):
        return image
    with reading():
        return _picture_to_rgb(image) if isinstance(image, Image.Image) else _array_to_rgb(image)


def conversions(image: Image.Image) -> tuple[str, ...]:
    """Return the conversions that this reader made on an image."""
    return image.info[NOTES] if _is_read(image) else ()


def _is_read(image: Image.Image) -> bool:
    """Return whether this reader made the image. Text in a PNG file may have this key, but is no tuple."""
    return isinstance(image.info.get(NOTES), tuple)


@contextmanager
def reading() -> Generator[None]:
    """Turn Pillow's exceptions for unreadable images into UnreadableImage."""
    try:
        with _quiet():
            yield
    except UnreadableImage:
        raise
    except UNREADABLE as error:
        raise UnreadableImage(error_message(error, None)) from None


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a Pillow image, from 1 (upright) to 8."""
    image.load()
    if image.format == "TIFF":  # Pillow turns it upright on load
        return 1
    return _stored_orientation(image)[0]


def check_size(width: int, height: int) -> None:
    """Raise UnreadableImage for an image or video frame of more than `MAX_PIXELS` pixels."""
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{width} x {height} pixels, the limit is {MAX_PIXELS / 1e6:.0f} million in all"
        )


def _read(source: str | os.PathLike[str] | bytes, metadata: Mapping[str, Any] | None = None) -> Image.Image:
    """Read an image file. metadata: what was split off it, in the form of a Pillow image's ``info``."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with _quiet(), Image.open(file, formats=_formats()) as image:
        rgb = _picture_to_rgb(image, metadata)
        if _has_more_frames(image):
            rgb.info[NOTES] += ("first frame",)
        return rgb


def _read_without_metadata(source: str | os.PathLike[str] | bytes) -> Image.Image | None:
    """Read a file that Pillow rejects after removing its metadata; None if that does not help."""
    try:
        split = split_metadata(source)
        return None if split is None else _read(*split)
    except UNREADABLE:
        return None


@contextmanager
def _quiet() -> Generator[None]:
    """Silence Pillow's warnings about damaged metadata; warnings of decompression bombs become errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _formats() -> list[str]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _picture_to_rgb(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> Image.Image:
    check_size(*image.size)
    tiles = getattr(image, "tile", ())  # read now: the decoder empties this list
    is_16_bit = any(";16" in str(tile.args) for tile in tiles)
    stored, damaged = _stored_orientation(image)
    image.load()
    check_size(*image.size)  # loading an icon may change its size to that of the picture inside
    turn = (metadata and stored_orientation(metadata)) or orientation(image)
    rgb, notes = colours_to_rgb(image)
    if turn in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[turn])
    facts = {
        "16-bit": is_16_bit,
        "rotated": {stored, turn} & {*_UPRIGHT},
        "damaged metadata": damaged or metadata is not None,
    }
    rgb.info = {NOTES: tuple(dict.fromkeys([*notes, *(name for name, holds in facts.items() if holds)]))}
    return rgb


def _stored_orientation(image: Image.Image) -> tuple[int, bool]:
    """Return the orientation in the metadata (1 if there is none), and whether Pillow fails to read it."""
    try:
        exif = image.getexif()
        value, damaged = exif.get(ORIENTATION), not exif and len(image.info.get("exif") or b"") > _EMPTY_EXIF
    except METADATA_ERRORS:
        value, damaged = None, True
    if isinstance(value, int) and 1 <= value <= 8:
        return value, damaged
    return stored_orientation(image.info) or 1, damaged


def _has_more_frames(image: Image.Image) -> bool:
    """Return whether the file has more than one frame.

    Called after loading, since looking for frames moves the file position.
    """
    try:
        return bool(getattr(image, "is_animated", False))
    except UNREADABLE:
        return False


def _array_to_rgb(array: Any) -> Image.Image:
    values = channels_last(array)
    height, width, channels = values.shape
    check_size(width, height)
    levels, notes = eight_bit(values)
    picture = Image.fromarray(np.ascontiguousarray(levels[..., 0] if channels == 1 else levels))
    rgb, more = colours_to_rgb(picture)
    rgb.info = {NOTES: tuple(dict.fromkeys([*notes, *more]))}
    return rgb


def _reason(error: Exception, source: str | os.PathLike[str] | bytes) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if (len(source) if isinstance(source, bytes) else _size(source)) == 0:
        return "an empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "of no known image format"
    return error_message(error, None)


def _size(path: str | os.PathLike[str]) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None


# --- images as callers of the processor pass them ---


def read_image(source: Any) -> Image.Image:
    """Read a path, URL, data URI, base64 text, a file's bytes, a Pillow image or an array as upright RGB.

    Raises UserError if it cannot be read or fetched.
    """
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
    """Decode base64 text, line breaks allowed. Raises ValueError for other text."""
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
