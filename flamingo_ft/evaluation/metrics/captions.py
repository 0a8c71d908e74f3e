"""Metrics of captions, each with plain tokens and with the official ones, which need Java.

Which tokens a metric uses is part of its name, so that a figure means the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .bleu import bleu, bleu_counts
from .cider import cider_d
from .java import PtbTokenizer, meteor, meteor_counts
from .metric import Metric, References, StatisticsFunction, per_pair
from .rouge import rouge_l
from .tokens import Tokenizer, Tokens, plain_tokens, tokenize_pairs

NOT_OFFICIAL = "not the official tokenisation"
LONGEST_BLEU = 4

TokenStatistics = Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], np.ndarray]


def points(value: float) -> str:
    """Return a value as it is published, times 100 and without a unit."""
    return f"{100 * value:.1f}"


def on_tokens(statistics: TokenStatistics, tokenizer: Tokenizer) -> StatisticsFunction:
    """Return the statistics of texts from those of their tokens."""

    def of_texts(predictions: Sequence[str], references: References) -> np.ndarray:
        return statistics(*tokenize_pairs(predictions, references, tokenizer))

    return of_texts


def _with_both_tokenizers(name: str, label: str, statistics: TokenStatistics, **options: Any) -> list[Metric]:
    """Return a metric with plain tokens, and as ``<name>_ptb`` with the official ones."""
    official, metric = f"{name}_ptb", partial(Metric, by_class=False, **options)
    return [
        metric(name, on_tokens(statistics, plain_tokens), f"{label} ({NOT_OFFICIAL})"),
        metric(official, on_tokens(statistics, PtbTokenizer(official)), label),
    ]


METEOR = Metric("meteor", meteor_counts, label="METEOR", aggregate=meteor, by_class=False)
CAPTION_METRICS = (
    *_with_both_tokenizers("cider_d", "CIDEr-D", cider_d, format=points, hub_type="cider", of_corpus=True),
    *(
        metric
        for n in range(1, LONGEST_BLEU + 1)
        for metric in _with_both_tokenizers(
            f"bleu_{n}", f"BLEU-{n}", partial(bleu_counts, longest=n), aggregate=bleu, hub_type="bleu"
        )
    ),
    *_with_both_tokenizers("rouge_l", "ROUGE-L", per_pair(rouge_l), hub_type="rouge"),
    METEOR,
)
