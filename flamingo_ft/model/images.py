"""The one image reader: from a file, a Pillow image or an array to upright 8-bit RGB.

Training, evaluation, the processor (and with it pipelines, the server and TRL), reports and checks all read
images here, so that a report shows what the model sees.

- The orientation in EXIF or XMP is applied. Damaged metadata is ignored and never costs the image.
- Transparent pixels are composited over white: the colours hidden under them were never meant to be seen.
- 16-bit, 32-bit and float values are scaled to 0..255 (`image_values.eight_bit` has the rule).
- Palette, CMYK, YCbCr, LAB and HSV become RGB as Pillow converts them; colour profiles are ignored.
- Of a file with several frames the first is read; of an open Pillow image, the current one.

The conversions made are in the image's ``info["conversions"]``, as names of `CONVERSIONS`.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from flamingo_ft.formatting import error_message

from .image_metadata import METADATA_ERRORS, ORIENTATION, split_metadata, stored_orientation
from .image_values import channels_last, eight_bit

READER_VERSION = 2  # increment it when a file is read into other pixels: feature caches depend on it
MAX_PIXELS = 89_478_485  # of one image or video frame; 256 MiB of RGB
# Pillow opens more formats, some by starting other programs (EPS); instruction data does not come in them.
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
_MODES = {
    "1": "black and white",
    **dict.fromkeys(("L", "LA", "La"), "greyscale"),
    **dict.fromkeys(("P", "PA"), "palette"),
    "CMYK": "CMYK",
    **dict.fromkeys(("YCbCr", "LAB", "HSV"), "other colour space"),
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


class UnreadableImage(ValueError):
    """No image can be read from the input; the message says why in a few words."""


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Read an image file, given as a path or as its content.

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
    """Whether this reader made the image. Text in a PNG file may have the same key, but is not a tuple."""
    return isinstance(image.info.get(NOTES), tuple)


@contextmanager
def reading() -> Iterator[None]:
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
    return (
        1 if image.format == "TIFF" else _stored_orientation(image)[0]
    )  # Pillow turns TIFF images itself on load


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
        found = split_metadata(source)
        return None if found is None else _read(*found)
    except UNREADABLE:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
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
    rgb, notes = _colours(image)
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
    """Whether the file has more than one frame. Called after loading, since looking for frames moves the file
    position.
    """
    try:
        return bool(getattr(image, "is_animated", False))
    except UNREADABLE:
        return False


def _colours(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return the image in RGB, and the conversions made."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image)
    notes = [_MODES[image.mode]] if image.mode in _MODES else []
    if _may_be_transparent(image):
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        # pyrefly: ignore[unsupported-operation]
        if rgba.getchannel("A").getextrema()[0] < 255:
            notes.append("transparent")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), notes
    return image.convert("RGB"), notes


def _may_be_transparent(image: Image.Image) -> bool:
    in_palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or in_palette or "transparency" in image.info


def _scaled(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Convert grey of 16 or 32 bits, or floats."""
    values = np.asarray(image)
    grey, notes = eight_bit(values)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int) and (values == hidden).any():
        grey, notes = np.where(values == hidden, np.uint8(255), grey), [*notes, "transparent"]
    return Image.fromarray(grey).convert("RGB"), notes


def _array_to_rgb(array: Any) -> Image.Image:
    values = channels_last(array)
    height, width, channels = values.shape
    check_size(width, height)
    levels, notes = eight_bit(values)
    picture = Image.fromarray(np.ascontiguousarray(levels[..., 0] if channels == 1 else levels))
    rgb, more = _colours(picture)
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
