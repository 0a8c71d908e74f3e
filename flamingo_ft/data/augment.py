"""Random augmentation of training images, before the tower's own transform.

All randomness comes from the seed that the caller gives for each use of an image, so the number of workers
does not matter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torchvision.transforms import v2

from flamingo_ft.config import AugmentationSection

functional: Any = v2.functional  # its annotations name tensors only; it takes PIL images too

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width to height of a crop, relative to the image's own


def augment(frames: Sequence[Image.Image], section: AugmentationSection, seed: int) -> list[Image.Image]:
    """Crop, flip and recolour the frames of a medium (one of an image), all in the same way.

    seed: of this use of this medium; the same seed gives the same frames.
    """
    rng = random.Random(seed)
    box, flip = _random_box(rng, section.crop), rng.random() < section.flip
    factors = [rng.uniform(1 - section.color, 1 + section.color) for _ in range(3)]
    augmented = [_crop(frame, box) for frame in frames]
    if flip:
        augmented = [functional.horizontal_flip(frame) for frame in augmented]
    return [_color(frame, *factors) for frame in augmented] if section.color else augmented


def _random_box(rng: random.Random, min_area: float) -> tuple[float, float, float, float]:
    """Return left, top, width and height of a crop, as fractions of the image's; its area is ``min_area``
    to 1."""
    area = rng.uniform(min_area, 1)
    # Beyond these ratios a crop of this area would not fit into the image.
    narrowest, widest = max(ASPECT_RATIOS[0], area), min(ASPECT_RATIOS[1], 1 / area)
    ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return rng.uniform(0, 1 - width), rng.uniform(0, 1 - height), width, height


def _crop(frame: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    left, top = round(box[0] * frame.width), round(box[1] * frame.height)
    width, height = max(1, round(box[2] * frame.width)), max(1, round(box[3] * frame.height))
    left, top = min(left, frame.width - width), min(top, frame.height - height)
    return functional.crop(frame, top, left, height, width)


def _color(frame: Image.Image, brightness: float, contrast: float, saturation: float) -> Image.Image:
    frame = functional.adjust_brightness(frame, brightness)
    frame = functional.adjust_contrast(frame, contrast)
    return functional.adjust_saturation(frame, saturation)
