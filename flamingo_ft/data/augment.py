"""Random changes to training images, before the tower's own transform.

Everything drawn comes from the seed that the caller gives for each time that an image is shown, so neither workers nor
their number matter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image
from torchvision.transforms.v2 import functional

from flamingo_ft.config import AugmentationSection

RATIO = (3 / 4, 4 / 3)  # width to height of a crop, relative to the image's own


def augment(frames: Sequence[Image.Image], wanted: AugmentationSection, seed: int) -> list[Image.Image]:
    """The frames of a medium (one of an image), each cropped, flipped and coloured in the same way.

    seed: of this showing of this medium; an equal one gives equal frames.
    """
    draw = random.Random(seed)
    box, flip = _draw_box(draw, wanted.crop), draw.random() < wanted.flip
    factors = [draw.uniform(1 - wanted.color, 1 + wanted.color) for _ in range(3)]
    frames = [_crop(frame, box) for frame in frames]
    frames = [functional.horizontal_flip(frame) for frame in frames] if flip else frames
    return [_color(frame, *factors) for frame in frames] if wanted.color else frames


def _draw_box(draw: random.Random, smallest: float) -> tuple[float, float, float, float]:
    """Left, top, width and height of a crop, as shares of the image's; ``smallest`` to all of its area."""
    area = draw.uniform(smallest, 1)
    narrowest, widest = max(RATIO[0], area), min(RATIO[1], 1 / area)  # beyond these it would not fit in
    ratio = math.exp(draw.uniform(math.log(narrowest), math.log(widest)))
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return draw.uniform(0, 1 - width), draw.uniform(0, 1 - height), width, height


def _crop(frame: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    left, top = round(box[0] * frame.width), round(box[1] * frame.height)
    width, height = max(1, round(box[2] * frame.width)), max(1, round(box[3] * frame.height))
    left, top = min(left, frame.width - width), min(top, frame.height - height)
    return functional.crop(frame, top, left, height, width)


def _color(frame: Image.Image, brightness: float, contrast: float, saturation: float) -> Image.Image:
    frame = functional.adjust_brightness(frame, brightness)
    frame = functional.adjust_contrast(frame, contrast)
    return functional.adjust_saturation(frame, saturation)
