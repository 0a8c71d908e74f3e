"""BLEU of a corpus of captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .ngrams import NgramCounts, Pairs, values_at
from .tokens import Tokens

# As in pycocoevalcap: no division by zero, and a corpus without a match has a BLEU just above 0.
SMALL, TINY = 1e-9, 1e-15


def bleu_counts(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], longest: int
) -> np.ndarray:
    """Return what BLEU adds up, for each of N predictions: array (N, 2 + 2 * longest).

    Its length and that of the reference nearest in length (the shorter one on a tie); its n-grams of 1, 2,
    ... tokens; and how many of them are in a reference, each at most as often as in the reference that has it
    most often.
    """
    pairs = Pairs.of(predictions, references)
    lengths = pairs.lengths[: pairs.predictions]
    closest = [
        min((abs(len(one) - length), len(one)) for one in several)[1]
        for length, several in zip(lengths.tolist(), references, strict=True)
    ]
    ngrams = [np.maximum(lengths - n, 0) for n in range(longest)]
    matches = [_matches(pairs, counts) for counts in pairs.ngrams(longest)]
    return np.stack([lengths, np.array(closest), *ngrams, *matches], axis=1).astype(np.float64)


def _matches(pairs: Pairs, ngrams: NgramCounts) -> np.ndarray:
    """Return the clipped matches (N,) of each prediction for one length of n-gram."""
    is_reference, keys = ngrams.sentence >= pairs.predictions, ngrams.keys(pairs.owner)
    order = np.lexsort((ngrams.count[is_reference], keys[is_reference]))
    sorted_keys, counts = keys[is_reference][order], ngrams.count[is_reference][order]
    is_largest = np.append(sorted_keys[1:] != sorted_keys[:-1], True)[: len(sorted_keys)]
    most = values_at(sorted_keys[is_largest], counts[is_largest], keys[~is_reference])
    clipped = np.minimum(most, ngrams.count[~is_reference])
    return np.bincount(ngrams.sentence[~is_reference], clipped, minlength=pairs.predictions)


def bleu(counts: np.ndarray) -> float:
    """Return the BLEU of a corpus from its `bleu_counts`, 0..1.

    The geometric mean of the precisions of n-grams, times exp(1 - r / c) if the predictions have c tokens in
    all and the references nearest in length have r > c (Papineni et al., 2002, aclanthology.org/P02-1040).
    """
    length, closest, *rest = counts.sum(axis=0).tolist()
    longest = len(rest) // 2
    precisions = [
        (matches + TINY) / (ngrams + SMALL)
        for ngrams, matches in zip(rest[:longest], rest[longest:], strict=True)
    ]
    ratio = (length + TINY) / (closest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return math.prod(precisions) ** (1 / longest) * brevity
