"""One picture in many kinds of files, each with the RGB pixels expected of it, computed with numpy."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 32  # the nano tower's, so that nothing is resized
RAMP = np.arange(SIDE * SIDE, dtype=np.float64).reshape(SIDE, SIDE) / (SIDE * SIDE - 1)  # 0..1
COLOURS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
ALPHA = (RAMP.T * 255).round().astype(np.uint8)
SIXTEEN = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)


@dataclass(frozen=True)
class Kind:
    """A file, its expected pixels (H, W, 3) uint8, its conversions, and the same picture as an array."""

    content: bytes
    expected: np.ndarray
    conversions: tuple[str, ...]
    array: np.ndarray | None = None


def file_of(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(values: np.ndarray, **options) -> bytes:
    return file_of(Image.fromarray(values), "PNG", **options)


def tiff(values: np.ndarray, **options) -> bytes:
    return file_of(Image.fromarray(values), "TIFF", **options)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(np.round(levels).astype(np.uint8)[..., None], 3, -1)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colours * share + 255 * (1 - share)).astype(np.uint8)


def _palette() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A palette image, its colours, and the transparency of each colour."""
    indices, table = (ALPHA // 8), np.random.default_rng(1).integers(0, 256, (32, 3), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(table.tobytes())
    return image, table[indices], np.linspace(0, 255, 32).round().astype(np.uint8)


def _of_depths() -> dict[str, Kind]:
    """Grey and RGB of 1, 8, 16 and 32 bits, and floats."""
    bits = COLOURS[..., 0] > 127
    dark = SIXTEEN // 256
    wide = (RAMP * 200_000).astype(np.int32)
    floats = {f"{top:g}": (RAMP * top).astype(np.float32) for top in (1, 255, 65535, 1e6)}
    ramp = grey(RAMP * 255)
    own_maximum = "scaled by its own maximum"
    return {
        "RGB": Kind(png(COLOURS), COLOURS, (), COLOURS),
        "grey": Kind(png(ALPHA), grey(ALPHA), ("greyscale",), ALPHA),
        "one bit": Kind(png(bits), grey(bits * 255), ("black and white",), bits),
        "16-bit PNG": Kind(png(SIXTEEN), grey(SIXTEEN / 257), ("16-bit",), SIXTEEN),
        "16-bit TIFF": Kind(tiff(SIXTEEN), grey(SIXTEEN / 257), ("16-bit",), SIXTEEN),
        "dark 16-bit PNG": Kind(png(dark), grey(dark / 257), ("16-bit",), dark),
        "float 0..1": Kind(tiff(floats["1"]), ramp, ("float",), floats["1"]),
        "float 0..255": Kind(tiff(floats["255"]), ramp, ("float",), floats["255"]),
        "float 0..65,535": Kind(tiff(floats["65535"]), ramp, ("float",)),
        "float 0..1,000,000": Kind(tiff(floats["1e+06"]), ramp, ("float", own_maximum)),
        "32-bit integers": Kind(tiff(wide), grey(wide / 200_000 * 255), ("32-bit integer", own_maximum)),
    }


def _with_transparency() -> dict[str, Kind]:
    rgba = np.dstack([COLOURS, ALPHA])
    la = np.dstack([COLOURS[..., 0], ALPHA])
    palette, painted, table = _palette()
    return {
        "RGBA": Kind(png(rgba), over_white(COLOURS, ALPHA), ("transparent",), rgba),
        "LA": Kind(png(la), over_white(np.repeat(la[..., :1], 3, -1), ALPHA), ("greyscale", "transparent")),
        "palette with tRNS": Kind(
            file_of(palette, "PNG", transparency=table.tobytes()),
            over_white(painted, table[ALPHA // 8]),
            ("palette", "transparent"),
        ),
        "one transparent colour": Kind(
            png(ALPHA, transparency=9),
            np.where(grey(ALPHA) == 9, 255, grey(ALPHA)).astype(np.uint8),
            ("greyscale", "transparent"),
        ),
        "transparent 16-bit": Kind(
            png(SIXTEEN, transparency=0),
            np.where(SIXTEEN[..., None] == 0, 255, grey(SIXTEEN / 257)).astype(np.uint8),
            ("transparent", "16-bit"),
        ),
        "WebP with alpha": Kind(
            file_of(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
            over_white(COLOURS, ALPHA),
            ("transparent",),
        ),
    }


def _of_other_forms() -> dict[str, Kind]:
    """CMYK, images with an EXIF orientation, and files of several frames."""
    cmyk = np.dstack([COLOURS, COLOURS[..., 0] // 4])
    ink = (255 - cmyk.astype(float)) / 255
    sideways = Image.Exif()
    sideways[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE), "red")]}
    turned = np.rot90(COLOURS, -1)
    turned_16_bit = np.rot90(grey(SIXTEEN / 257), -1)
    return {
        "CMYK": Kind(
            file_of(Image.frombytes("CMYK", (SIDE, SIDE), cmyk.tobytes()), "TIFF"),
            np.round(ink[..., :3] * ink[..., 3:] * 255).astype(np.uint8),
            ("CMYK",),
        ),
        "sideways": Kind(png(COLOURS, exif=sideways), turned, ("rotated",)),
        "sideways TIFF": Kind(tiff(COLOURS, exif=sideways), turned, ("rotated",)),
        "sideways 16-bit": Kind(png(SIXTEEN, exif=sideways), turned_16_bit, ("16-bit", "rotated")),
        "two frames": Kind(png(COLOURS, **frames), COLOURS, ("first frame",)),
        "two pages": Kind(tiff(COLOURS, **frames), COLOURS, ("first frame",)),
    }


KINDS = {**_of_depths(), **_with_transparency(), **_of_other_forms()}
