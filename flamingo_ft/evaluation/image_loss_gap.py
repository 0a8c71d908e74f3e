"""The image loss gap: how much the loss rises when every sample is shown another sample's images.

It is the part of the loss that the images explain, in nats per label token. A model that does not look has a
gap of exactly 0: it predicts the answers from the text alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_SAMPLES = 20  # fewer allow no conclusion
CLEAR = 3.0  # standard errors from zero; a curve has many points, and 2 would be exceeded by chance
LOG_KEY = "eval_image_loss_gap"
CLEARLY_ABOVE = "clearly above zero"
CLEARLY_BELOW = "clearly below zero: the images mislead the model, a sign of overfitting"
INDISTINGUISHABLE = "not distinguishable from zero"


def ratio_standard_error(differences: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the standard error of sum(differences) / sum(sizes), a ratio estimator.

    It is 0 for a single sample, whose spread is unknown.
    """
    count, total = len(differences), sum(sizes)
    if count < 2:
        return 0.0
    mean = sum(differences) / total
    squares = sum((d - mean * size) ** 2 for d, size in zip(differences, sizes, strict=True))
    return math.sqrt(squares * count / (count - 1)) / total


@dataclass(frozen=True)
class ImageLossGap:
    """Loss with the images of another sample minus loss with the true ones, over the same label tokens.

    value, standard_error: nats per label token; the error is that of the paired differences over samples.
    samples: how many were compared, each with images that could be swapped.
    """

    value: float
    standard_error: float
    samples: int

    @classmethod
    def of_losses(
        cls, true: Sequence[float], swapped: Sequence[float], label_tokens: Sequence[int]
    ) -> ImageLossGap:
        """Compare the summed losses of the same samples with their true and with swapped images."""
        differences = [other - own for own, other in zip(true, swapped, strict=True)]
        error = ratio_standard_error(differences, label_tokens)
        return cls(math.fsum(differences) / sum(label_tokens), error, len(differences))

    @classmethod
    def of_log(cls, entry: Mapping[str, Any]) -> ImageLossGap | None:
        """Return the gap of a log entry, if it has one."""
        if LOG_KEY not in entry:
            return None
        return cls(entry[LOG_KEY], entry[f"{LOG_KEY}_standard_error"], entry[f"{LOG_KEY}_samples"])

    def log_values(self) -> dict[str, float]:
        """Return the keys and values of a log entry."""
        return {
            LOG_KEY: self.value,
            f"{LOG_KEY}_standard_error": self.standard_error,
            f"{LOG_KEY}_samples": self.samples,
        }

    @property
    def conclusion(self) -> str | None:
        """Whether the gap differs from zero, in words; None if that cannot be said."""
        if self.samples < MIN_SAMPLES or not math.isfinite(self.value):
            return None
        if abs(self.value) <= CLEAR * self.standard_error:
            return INDISTINGUISHABLE
        return CLEARLY_ABOVE if self.value > 0 else CLEARLY_BELOW

    @property
    def text(self) -> str:
        """The gap with its standard error, without the unit: ``+0.412 ± 0.031``."""
        return f"{self.value:+.3g} ± {self.standard_error:.2g}"

    @property
    def sentence(self) -> str:
        """What was found, as a clause of the verdict."""
        return f"another image changes the loss by {self.text} nats per label token, {self.conclusion}"
