"""The held-out loss of rows without images, apart from that of rows with images, in nats per label token.

Training on images may cost a language model its abilities on text alone; the loss of text-only rows shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TEXT_ONLY, WITH_IMAGES = "text_only", "with_images"
KIND_LABELS = {TEXT_ONLY: "text only", WITH_IMAGES: "with images"}


def log_key(kind: str) -> str:
    """Return the key of a kind's loss in the log."""
    return f"eval_loss_{kind}"


@dataclass(frozen=True)
class KindLoss:
    """The mean loss over the label tokens of one kind of rows, and how many rows there are."""

    value: float
    samples: int


@dataclass(frozen=True)
class LossByKind:
    """The losses of `TEXT_ONLY` rows and, if there are any, of rows `WITH_IMAGES`."""

    losses: Mapping[str, KindLoss]

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[bool, float, int]]) -> LossByKind | None:
        """Return the losses of rows, each with whether it has images, its summed loss and its label tokens.

        None without a text-only row: the loss of all rows is then that of rows with images.
        """
        losses = {}
        for kind, has_images in ((TEXT_ONLY, False), (WITH_IMAGES, True)):
            own = [(loss, tokens) for images, loss, tokens in rows if images is has_images]
            if own:
                value = math.fsum(loss for loss, _ in own) / sum(tokens for _, tokens in own)
                losses[kind] = KindLoss(value, len(own))
        return cls(losses) if TEXT_ONLY in losses else None

    @classmethod
    def of_log(cls, entry: Mapping[str, Any]) -> LossByKind | None:
        """Return the losses of a log entry, if it has them."""
        losses = {
            kind: KindLoss(entry[key], entry[f"{key}_samples"])
            for kind in KIND_LABELS
            if (key := log_key(kind)) in entry
        }
        return cls(losses) if losses else None

    def log_values(self) -> dict[str, float]:
        """Return the keys and values of a log entry."""
        values: dict[str, float] = {}
        for kind, loss in self.losses.items():
            values |= {log_key(kind): loss.value, f"{log_key(kind)}_samples": loss.samples}
        return values


def loss_record(by_condition: Mapping[str, LossByKind]) -> dict[str, dict[str, float]]:
    """Return the ``loss_by_kind`` record of metrics.json: samples and losses by condition, for each kind."""
    record: dict[str, dict[str, float]] = {}
    for condition, measured in by_condition.items():
        for kind, loss in measured.losses.items():
            record.setdefault(kind, {"samples": loss.samples})[condition] = loss.value
    return record
