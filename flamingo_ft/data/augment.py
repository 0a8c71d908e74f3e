"""Random augmentation of training images: one draw, applied to pictures and to where boxes on them are."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL.Image import Image as Picture
from torchvision.transforms import v2

from flamingo_ft.config import AugmentationSection
from flamingo_ft.model.geometry import ImageGeometry

functional: Any = v2.functional  # its annotations name tensors only; it takes PIL images too

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width to height of a random crop, relative to the image's own
WHOLE = (0.0, 0.0, 1.0, 1.0)

Part = tuple[float, float, float, float]  # left, top, width and height, as fractions of the image


@dataclass(frozen=True)
class Augmentation:
    """What happens to all frames of a medium (an image has one) in one use.

    crop: the part that is kept. flip: left and right are swapped. colors: factors of brightness, contrast and
    saturation; None to leave them.
    """

    crop: Part
    flip: bool
    colors: tuple[float, float, float] | None

    @classmethod
    def draw(cls, section: AugmentationSection, seed: int) -> Augmentation:
        """Draw an augmentation within the limits of the recipe.

        All randomness comes from ``seed``, one per use of a medium, so the number of workers does not matter.
        """
        rng = random.Random(seed)
        crop, flip = _random_part(rng, section.crop), rng.random() < section.flip
        brightness, contrast, saturation = (
            rng.uniform(1 - section.color, 1 + section.color) for _ in range(3)
        )
        return cls(crop, flip, (brightness, contrast, saturation) if section.color else None)

    def without_crop(self) -> Augmentation:
        """Return the same augmentation of the whole image."""
        return replace(self, crop=WHOLE)

    def apply(self, frames: Sequence[Picture]) -> list[Picture]:
        """Return the frames cropped, flipped and recolored."""
        augmented = [_crop(frame, self.crop) for frame in frames]
        if self.flip:
            augmented = [functional.horizontal_flip(frame) for frame in augmented]
        return [_color(frame, *self.colors) for frame in augmented] if self.colors else augmented

    def geometry(self, picture: ImageGeometry) -> ImageGeometry:
        """Return where points of a picture are after `apply`."""
        cropped = picture.crop(*_pixels(self.crop, *picture.picture_size))
        return cropped.flip() if self.flip else cropped


def _random_part(rng: random.Random, min_area: float) -> Part:
    """Return a part of at least ``min_area`` of the image."""
    area = rng.uniform(min_area, 1)
    # Beyond these ratios a crop of this area would not fit into the image.
    narrowest, widest = max(ASPECT_RATIOS[0], area), min(ASPECT_RATIOS[1], 1 / area)
    ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return rng.uniform(0, 1 - width), rng.uniform(0, 1 - height), width, height


def _pixels(part: Part, image_width: int, image_height: int) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a part in whole pixels."""
    left, top = round(part[0] * image_width), round(part[1] * image_height)
    width, height = max(1, round(part[2] * image_width)), max(1, round(part[3] * image_height))
    return min(left, image_width - width), min(top, image_height - height), width, height


def _crop(frame: Picture, part: Part) -> Picture:
    left, top, width, height = _pixels(part, frame.width, frame.height)
    return functional.crop(frame, top, left, height, width)


def _color(frame: Picture, brightness: float, contrast: float, saturation: float) -> Picture:
    frame = functional.adjust_brightness(frame, brightness)
    frame = functional.adjust_contrast(frame, contrast)
    return functional.adjust_saturation(frame, saturation)
