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
    """content: the file. expected: (H, W, 3) uint8. conversions: what `check` counts. array: the same as
    numpy.
    """

    content: bytes
    expected: np.ndarray
    conversions: tuple[str, ...]
    array: np.ndarray | None = None


def file_of(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


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


def _kinds() -> dict[str, Kind]:
    rgba = np.dstack([COLOURS, ALPHA])
    la = np.dstack([COLOURS[..., 0], ALPHA])
    palette, painted, table = _palette()
    sideways = Image.Exif()
    sideways[0x0112] = 6
    tiff = {f"{top:g}": (RAMP * top).astype(np.float32) for top in (1, 255, 65535, 1e6)}
    cmyk = np.dstack([COLOURS, COLOURS[..., 0] // 4])
    ink = (255 - cmyk.astype(float)) / 255
    picture = Image.fromarray(COLOURS)
    bits = COLOURS[..., 0] > 127
    wide = (RAMP * 200_000).astype(np.int32)
    first_frame = {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE), "red")]}
    return {
        "RGB": Kind(file_of(picture, "PNG"), COLOURS, (), COLOURS),
        "grey": Kind(file_of(Image.fromarray(ALPHA), "PNG"), grey(ALPHA), ("greyscale",), ALPHA),
        "one bit": Kind(file_of(Image.fromarray(bits), "PNG"), grey(bits * 255), ("black and white",), bits),
        "16-bit PNG": Kind(
            file_of(Image.fromarray(SIXTEEN), "PNG"), grey(SIXTEEN / 257), ("16-bit",), SIXTEEN
        ),
        "16-bit TIFF": Kind(
            file_of(Image.fromarray(SIXTEEN), "TIFF"), grey(SIXTEEN / 257), ("16-bit",), SIXTEEN
        ),
        "dark 16-bit PNG": Kind(
            file_of(Image.fromarray(SIXTEEN // 256), "PNG"),
            grey(SIXTEEN // 256 / 257),
            ("16-bit",),
            SIXTEEN // 256,
        ),
        "float 0..1": Kind(
            file_of(Image.fromarray(tiff["1"]), "TIFF"), grey(RAMP * 255), ("float",), tiff["1"]
        ),
        "float 0..255": Kind(
            file_of(Image.fromarray(tiff["255"]), "TIFF"), grey(RAMP * 255), ("float",), tiff["255"]
        ),
        "float 0..65,535": Kind(
            file_of(Image.fromarray(tiff["65535"]), "TIFF"), grey(RAMP * 255), ("float",)
        ),
        "float 0..1,000,000": Kind(
            file_of(Image.fromarray(tiff["1e+06"]), "TIFF"),
            grey(RAMP * 255),
            ("float", "scaled by its own maximum"),
        ),
        "32-bit integers": Kind(
            file_of(Image.fromarray(wide), "TIFF"),
            grey(wide / 200_000 * 255),
            ("32-bit integer", "scaled by its own maximum"),
        ),
        "RGBA": Kind(
            file_of(Image.fromarray(rgba), "PNG"), over_white(COLOURS, ALPHA), ("transparent",), rgba
        ),
        "LA": Kind(
            file_of(Image.fromarray(la), "PNG"),
            over_white(np.repeat(la[..., :1], 3, -1), ALPHA),
            ("greyscale", "transparent"),
        ),
        "palette with tRNS": Kind(
            file_of(palette, "PNG", transparency=table.tobytes()),
            over_white(painted, table[ALPHA // 8]),
            ("palette", "transparent"),
        ),
        "one transparent colour": Kind(
            file_of(Image.fromarray(ALPHA), "PNG", transparency=9),
            np.where(grey(ALPHA) == 9, 255, grey(ALPHA)).astype(np.uint8),
            ("greyscale", "transparent"),
        ),
        "transparent 16-bit": Kind(
            file_of(Image.fromarray(SIXTEEN), "PNG", transparency=0),
            np.where(SIXTEEN[..., None] == 0, 255, grey(SIXTEEN / 257)).astype(np.uint8),
            ("transparent", "16-bit"),
        ),
        "WebP with alpha": Kind(
            file_of(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
            over_white(COLOURS, ALPHA),
            ("transparent",),
        ),
        "CMYK": Kind(
            file_of(Image.frombytes("CMYK", (SIDE, SIDE), cmyk.tobytes()), "TIFF"),
            np.round(ink[..., :3] * ink[..., 3:] * 255).astype(np.uint8),
            ("CMYK",),
        ),
        "sideways": Kind(file_of(picture, "PNG", exif=sideways), np.rot90(COLOURS, -1), ("rotated",)),
        "sideways TIFF": Kind(file_of(picture, "TIFF", exif=sideways), np.rot90(COLOURS, -1), ("rotated",)),
        "sideways 16-bit": Kind(
            file_of(Image.fromarray(SIXTEEN), "PNG", exif=sideways),
            np.rot90(grey(SIXTEEN / 257), -1),
            ("16-bit", "rotated"),
        ),
        "two frames": Kind(file_of(picture, "PNG", **first_frame), COLOURS, ("first frame",)),
        "two pages": Kind(file_of(picture, "TIFF", **first_frame), COLOURS, ("first frame",)),
    }


KINDS = _kinds()
