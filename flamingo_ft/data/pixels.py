"""An image file to RGB pixels, upright, whatever its format and mode."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow opens more, some of them by starting other programs (EPS), and none that instruction data is kept in.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
MOST_PIXELS = 89_478_485  # 256 MiB of RGB; Pillow warns from here on
# What Pillow's decoders were seen to raise for files that are damaged or no images at all.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    RuntimeError,
    EOFError,
    OverflowError,
    IndexError,
    KeyError,
    struct.error,
    Image.DecompressionBombError,
)


class UnreadableImage(ValueError):
    """No image can be made of a file; why, in a few words."""


def decode(content: str | Path | bytes) -> Image.Image:
    """A file, or its content, as RGB: upright (EXIF), transparent parts white, 16 bits scaled to 8, of several frames
    the first. UnreadableImage otherwise, and for one of more than `MOST_PIXELS`, which is not decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, of sizes that are checked below
            with Image.open(
                io.BytesIO(content) if isinstance(content, bytes) else content, formats=_formats()
            ) as image:
                _check_size(image.size)
                image.load()
                return ImageOps.exif_transpose(to_rgb(image))
    except UnreadableImage:
        raise
    except UNREADABLE as error:
        raise UnreadableImage(_reason(error, content)) from None


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, with the metadata that tells which side is up."""
    exif = image.info.get("exif")
    if image.mode.startswith("I") or image.mode == "F":
        rgb = _scaled(image).convert("RGB")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgb = _over_white(image)
    else:
        rgb = image.convert("RGB")
    rgb.info = {"exif": exif} if exif else {}
    if not exif and image.getexif():
        rgb.info["exif"] = image.getexif().tobytes()
    return rgb


def _over_white(image: Image.Image) -> Image.Image:
    """The image on a white page: what lies under transparent pixels was never meant to be seen."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, to 8 bits: white is 1, 255, 65,535 or their largest, as they reach."""
    grey = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0).clip(min=0)
    largest = grey.max(initial=0)
    if image.mode.startswith("I;16"):
        white = 65_535  # a dark picture of 16 bits stays dark
    elif image.mode == "F" and largest <= 1:
        white = 1
    else:
        white = next((limit for limit in (255, 65_535) if largest <= limit), largest)
    return Image.fromarray(np.round(grey / white * 255).astype(np.uint8))


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MOST_PIXELS:
        limit = f"{MOST_PIXELS / 1e6:.0f} million"
        raise UnreadableImage(f"{width} x {height} pixels, the limit is {limit} in all")


def _reason(error: Exception, content: str | Path | bytes) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    size = len(content) if isinstance(content, bytes) else _size(content)
    if size == 0:
        return "an empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "of no known image format"
    return " ".join(str(error).split()) or type(error).__name__


def _size(path: str | Path) -> int | None:
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return None
