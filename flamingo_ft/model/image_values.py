"""Pixel values and colours of any kind to 8-bit RGB, and arrays to (height, width, channels).

Shapes: H height, W width, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
OVERSHOOT = 2  # times white: floats up to this are an image that resampling made slightly too bright
UNDERSHOOT = 0.25  # times the largest value: values further below zero are too low to be rounding errors
DARKEST = 16  # floats with a maximum between OVERSHOOT and this are normalized pixels if any is negative

_MODES = {
    "1": "black and white",
    **dict.fromkeys(("L", "LA", "La"), "greyscale"),
    **dict.fromkeys(("P", "PA"), "palette"),
    "CMYK": "CMYK",
    **dict.fromkeys(("YCbCr", "LAB", "HSV"), "other colour space"),
}


def colours_to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return a Pillow image in RGB, and the names of the conversions made (`images.CONVERSIONS`).

    Transparent pixels are composited over white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(image)
    notes = [_MODES[image.mode]] if image.mode in _MODES else []
    if _may_be_transparent(image):
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        # pyrefly: ignore[unsupported-operation]
        if rgba.getchannel("A").getextrema()[0] < 255:
            notes.append("transparent")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), notes
    return image.convert("RGB"), notes


def eight_bit(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Scale values to 0..255, rounded, and name the conversions made, as `colours_to_rgb` does.

    bool and uint8 stay as they are. uint16: white is 65,535, however dark the image. Other integers and
    floats have no fixed white: it is the smallest of 255 and 65,535 (floats: 1, 255 and 65,535) that the
    maximum does not exceed, floats by up to `OVERSHOOT`, or the maximum itself. Slightly negative values and
    NaN become black, values above white become white. Raises ValueError for values far below zero (normalized
    pixels, temperatures).
    """
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255), []
    if values.dtype == np.uint8:
        return values, []
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8), ["16-bit"]  # 257 is 65,535 / 255
    return _scaled(values.astype(np.float64), floats=values.dtype.kind == "f")


def channels_last(array: Any) -> np.ndarray:
    """Return a numpy array or torch tensor (H, W), (H, W, C) or (C, H, W) as (H, W, C).

    If both ends of a shape could be channels, they are the first axis of a tensor and the last of an array.
    Raises ValueError for anything else.
    """
    if isinstance(array, torch.Tensor):
        values = _to_numpy(array)
    elif isinstance(array, np.ndarray):
        values = array
    else:
        raise ValueError(f"got {type(array).__name__}; pass a Pillow image, numpy array or torch tensor")
    if values.dtype.kind not in "buif":
        raise ValueError(f"got an array of {values.dtype}; pass integers or floats")
    shape = tuple(values.shape)
    if values.size == 0:
        raise ValueError(f"got an array of shape {shape}, which has no pixels")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("got NaN or infinite pixel values")
    if len(shape) == 2:
        return values[..., None]
    if len(shape) == 4:
        raise ValueError(f"got an array of shape {shape}, a batch; pass a list of images")
    if len(shape) != 3 or not {shape[0], shape[2]} & {*CHANNELS}:
        expected = (
            "(height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels"
        )
        raise ValueError(f"got an array of shape {shape}; pass {expected}")
    first = shape[2] not in CHANNELS or (isinstance(array, torch.Tensor) and shape[0] in CHANNELS)
    return np.moveaxis(values, 0, -1) if first else values


def _may_be_transparent(image: Image.Image) -> bool:
    in_palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or in_palette or "transparency" in image.info


def _grey_to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Convert grey of 16 or 32 bits, or floats."""
    values = np.asarray(image)
    grey, notes = eight_bit(values)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int) and (values == hidden).any():
        grey, notes = np.where(values == hidden, np.uint8(255), grey), [*notes, "transparent"]
    return Image.fromarray(grey).convert("RGB"), notes


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _scaled(values: np.ndarray, floats: bool) -> tuple[np.ndarray, list[str]]:
    finite = values[np.isfinite(values)]
    lowest, largest = float(finite.min(initial=0)), float(finite.max(initial=0))
    if lowest < -_allowed_below_zero(largest, floats):
        raise ValueError(
            f"got pixel values from {lowest:.4g} to {largest:.4g}; "
            "pass floats in 0..1 or integers in 0..255, before any normalization"
        )
    white = _white(largest, floats)
    notes = ["float" if floats else "32-bit integer"]
    if white not in (1, 255, 65_535):
        notes.append("scaled by its own maximum")
    if len(finite) < values.size or largest > white or lowest < 0:
        notes.append("clipped")
    values = np.nan_to_num(values, nan=0, posinf=white, neginf=0)
    return np.round(values.clip(0, white) * (255 / white)).astype(np.uint8), notes


def _white(largest: float, floats: bool) -> float:
    limits = [limit * OVERSHOOT for limit in (1, 255, 65_535)] if floats else [255, 65_535]
    for limit in limits:
        if largest <= limit:
            return limit / OVERSHOOT if floats else limit
    return largest


def _allowed_below_zero(largest: float, floats: bool) -> float:
    return 0 if floats and OVERSHOOT < largest < DARKEST else UNDERSHOOT * largest
