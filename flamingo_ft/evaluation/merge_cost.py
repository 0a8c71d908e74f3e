"""What merging costs: loss and exact-match accuracy of the merged model beside the adapter's, on the same samples.

Distances between logits are reported and decide nothing: 4-bit quantization alone moves a real model's logits by a
third of the largest, so they cannot tell a wrong merge from a right one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo_ft.data.collate import load_media
from flamingo_ft.data.encode import IGNORED, Encoded
from flamingo_ft.data.sample import Sample
from flamingo_ft.model import FlamingoForConditionalGeneration, FlamingoProcessor

from .accuracy import answer_questions, is_right
from .merge_probe import Probe

LOSS_MARGIN = (
    0.5  # nats per token: SmolLM2-135M, small enough to suffer most, loses or wins 0.2 by leaving nf4 alone
)
ACCURACY_MARGIN = 0.1  # share of answers
MADE_UP_FACTOR = (
    4  # where the adapter's own answers stand in for right ones, every other model does worse on them
)
POSITIONS = 256  # label positions whose logits are kept for comparison: 150 MB for a vocabulary of 150,000


@dataclass(frozen=True)
class Measured:
    """One model on a probe. losses: summed over each sample's label tokens; tokens: how many those are; right: whether
    each question was answered rightly; logits (positions, vocabulary): of the first label positions."""

    losses: Sequence[float]
    tokens: Sequence[int]
    right: Sequence[bool]
    logits: Tensor

    @property
    def loss(self) -> float:
        """Mean over all label tokens, in nats."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; None without questions."""
        return sum(self.right) / len(self.right) if self.right else None


@torch.no_grad()
def measure(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, probe: Probe) -> Measured:
    """Loss on the probe's samples, one at a time, and answers to its questions."""
    losses, tokens, kept, room = [], [], [], POSITIONS
    for sample, encoded in probe.encoded:
        logits, labels = _at_labels(model, processor, sample, encoded)
        losses.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")))
        tokens.append(len(labels))
        kept.append(logits[:room].cpu())
        room -= len(kept[-1])
    said = answer_questions(model, processor, probe.questions, probe.batch_size, probe.max_new_tokens)
    right = [is_right(question, answer) for question, answer in zip(probe.questions, said, strict=True)]
    return Measured(losses, tokens, right, torch.cat(kept))


def _at_labels(
    model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, sample: Sample, encoded: Encoded
) -> tuple[Tensor, Tensor]:
    """Logits (N, vocabulary), in float32, of the N positions that predict a label, and the labels (N,)."""
    media = load_media(processor, [{"images": sample.images[: encoded.images], "where": sample.where}])
    inputs = {"input_ids": torch.tensor([encoded.input_ids]), **media}
    logits = model(
        **{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=False
    ).logits[0, :-1]
    labels = torch.tensor(encoded.labels[1:], device=logits.device)
    return logits[labels != IGNORED].float(), labels[labels != IGNORED]


def cost(
    models: Mapping[str, Measured], probe: Probe, margin: float, accuracy_margin: float
) -> dict[str, Any]:
    """Return the figures of ``models`` for ``merge.json``, with how much worse ``merged`` is than ``adapter``.

    loss_increase, accuracy_drop: with the standard errors of the paired differences. worse: whether either is beyond
    its margin by more than twice that, or the loss is not finite. Made-up prompts have no right answers: agreement
    with the adapter's decides nothing, and the margin of the loss is wider.
    """
    adapter, merged = models["adapter"], models["merged"]
    increase = merged.loss - adapter.loss
    loss_error = _standard_error(
        [m - a for m, a in zip(merged.losses, adapter.losses, strict=True)], merged.tokens
    )
    drops = [float(a) - float(m) for m, a in zip(merged.right, adapter.right, strict=True)]
    drop = sum(drops) / len(drops) if drops else 0.0
    drop_error = _standard_error(drops, [1] * len(drops))
    limit = margin * MADE_UP_FACTOR if probe.made_up else margin
    worse = not increase - 2 * loss_error <= limit or (
        not probe.made_up and drop - 2 * drop_error > accuracy_margin
    )
    return {
        "samples": len(merged.losses),
        "label_tokens": sum(merged.tokens),
        "answers": len(merged.right),
        "loss": {name: found.loss for name, found in models.items()},
        "accuracy": {name: found.accuracy for name, found in models.items()},
        "loss_increase": increase,
        "loss_increase_standard_error": loss_error,
        "accuracy_drop": drop,
        "accuracy_drop_standard_error": drop_error,
        "margin": limit,
        "accuracy_margin": None if probe.made_up else accuracy_margin,
        "worse": worse,
    }


def _standard_error(differences: Sequence[float], sizes: Sequence[int]) -> float:
    """Of the sum of differences over the sum of sizes (ratio estimator); 0 for one sample, whose
    spread is unknown."""
    count, total = len(differences), sum(sizes)
    if count < 2:
        return 0.0
    mean = sum(differences) / total
    squares = sum(
        (difference - mean * size) ** 2 for difference, size in zip(differences, sizes, strict=True)
    )
    return math.sqrt(squares * count / (count - 1)) / total


def logit_difference(found: Measured, expected: Measured) -> dict[str, Any]:
    """Return the largest difference of two models' logits, the same relative to the largest logit, and the share of
    positions (token_agreement) where both find the same token most likely."""
    largest = float((found.logits - expected.logits).abs().max())
    agreement = (found.logits.argmax(-1) == expected.logits.argmax(-1)).float().mean()
    return {
        "max_logit_difference": largest,
        "relative": largest / float(expected.logits.abs().max()),
        "token_agreement": float(agreement),
        "tokens": len(expected.logits),
        "prompts": len(expected.losses),
    }
