"""The 1,797 UCI scans that scikit-learn carries, as pictures, with one fixed split.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository (1998), https://doi.org/10.24432/C50P49, CC BY 4.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SPLIT_SEED = 0
HELD_OUT_PER_DIGIT = 36
SIDE = 32
LEVELS = 16


@dataclass(frozen=True)
class Scan:
    """One scan: `number` counts from 1 in scikit-learn's order; `pixels` is (8, 8) with values 0 to 16."""

    number: int
    digit: int
    pixels: np.ndarray

    @property
    def file_name(self) -> str:
        return f"images/{self.number:04d}.png"

    def picture(self) -> Image.Image:
        """The scan as a grey image of 32 x 32 pixels, white ink on black, resized bicubically."""
        grey = np.round(self.pixels * (255 / LEVELS)).astype(np.uint8)
        return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def load_scans() -> list[Scan]:
    """All scans in scikit-learn's order; scikit-learn is needed here and nowhere else."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pairs = zip(data.images, data.target, strict=True)
    return [Scan(i + 1, int(digit), pixels) for i, (pixels, digit) in enumerate(pairs)]


def split_scans(scans: list[Scan]) -> tuple[list[Scan], list[Scan]]:
    """(training scans, held-out scans): 36 of each digit are held out, chosen by a fixed seed.

    A held-out scan whose pixels also occur among the training scans moves to the training side.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    held_out: set[int] = set()
    for digit in range(10):
        numbers = [scan.number for scan in scans if scan.digit == digit]
        held_out.update(rng.permutation(numbers)[:HELD_OUT_PER_DIGIT].tolist())
    train = [scan for scan in scans if scan.number not in held_out]
    seen = {scan.pixels.tobytes() for scan in train}
    test = [scan for scan in scans if scan.number in held_out]
    train += [scan for scan in test if scan.pixels.tobytes() in seen]
    return train, [scan for scan in test if scan.pixels.tobytes() not in seen]
