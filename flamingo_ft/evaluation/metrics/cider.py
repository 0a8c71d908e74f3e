"""CIDEr-D: agreement of a caption with people's, n-grams that are common in the data counting little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .ngrams import NgramCounts, Pairs, values_at
from .tokens import Tokens

LONGEST = 4  # tokens of an n-gram
SIGMA = 6.0  # of the penalty on a difference in length
SCALE = 10.0


def cider_d(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """Return the CIDEr-D of each prediction, 0..10 (the mean is that of the corpus), as pycocoevalcap does.

    For n = 1..4: cosine of the TF-IDF vectors of prediction and reference, the prediction's counts clipped to
    the reference's, times exp(-d^2 / (2 * 6^2)), where d is the difference in bigrams. The mean over n and
    references, times 10 (Vedantam et al., 2015, arXiv:1411.5726, section 6). An n-gram's document frequency
    is the number of predictions with a reference that has it, so the score depends on all references.
    """
    pairs = Pairs.of(predictions, references)
    similarity = sum(_cosines(pairs, ngrams) for ngrams in pairs.ngrams(LONGEST)) / LONGEST
    bigrams = np.maximum(pairs.lengths - 1, 0)
    distance = bigrams - bigrams[pairs.owner]
    similarity *= np.exp(-(distance**2) / (2 * SIGMA**2))
    is_reference = np.arange(len(pairs.sentences)) >= pairs.predictions
    total = np.bincount(pairs.owner[is_reference], similarity[is_reference], minlength=pairs.predictions)
    return SCALE * total / [len(several) for several in references]


def _cosines(pairs: Pairs, ngrams: NgramCounts) -> np.ndarray:
    """Return the similarity (S,) of each sentence to its prediction, for one length of n-gram."""
    is_reference = ngrams.sentence >= pairs.predictions
    keys = ngrams.keys(pairs.owner)
    documents = np.bincount(np.unique(keys[is_reference]) % ngrams.distinct, minlength=ngrams.distinct)
    weights = ngrams.count * (np.log(pairs.predictions) - np.log(np.maximum(documents, 1)))[ngrams.ngram]
    # Entries are ordered by sentence, so the keys of the predictions are sorted.
    own = values_at(keys[~is_reference], weights[~is_reference], keys)
    products, count = np.minimum(own, weights) * weights, len(pairs.sentences)
    dot = np.bincount(ngrams.sentence, products, minlength=count)
    norms = np.sqrt(np.bincount(ngrams.sentence, weights**2, minlength=count))
    lengths = norms * norms[pairs.owner]
    return np.divide(dot, lengths, out=np.zeros(count), where=lengths > 0)
