"""n-grams of tokenized sentences, counted as arrays: 240,000 captions take seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from .tokens import Tokens


@dataclass(frozen=True)
class NgramCounts:
    """The n-grams of one length in all sentences; an entry is an n-gram of a sentence.

    sentence, ngram, count (E entries,): index of the sentence, number of the n-gram below ``distinct``, and
    how often it occurs in the sentence. Entries are ordered by sentence, then by n-gram.
    """

    sentence: np.ndarray
    ngram: np.ndarray
    count: np.ndarray
    distinct: int

    def keys(self, groups: np.ndarray) -> np.ndarray:
        """Return one integer for each entry, from its n-gram and the group that its sentence belongs to."""
        return groups[self.sentence] * self.distinct + self.ngram


@dataclass(frozen=True)
class Pairs:
    """Predictions and their references as one list of sentences, the predictions first.

    owner (S sentences,): index of the prediction that each sentence is, or is a reference of.
    """

    sentences: list[Tokens]
    owner: np.ndarray
    predictions: int

    @classmethod
    def of(cls, predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Pairs:
        """Join tokenized predictions and references."""
        sentences = [*predictions, *chain.from_iterable(references)]
        indices = np.arange(len(predictions))
        owner = np.concatenate([indices, np.repeat(indices, [len(several) for several in references])])
        return cls(sentences, owner, len(predictions))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence."""
        return np.array([len(sentence) for sentence in self.sentences], dtype=np.int64)

    def ngrams(self, longest: int) -> Iterator[NgramCounts]:
        """Yield the n-grams of 1, 2, ... ``longest`` tokens."""
        return count_ngrams(self.sentences, longest)


def count_ngrams(sentences: Sequence[Tokens], longest: int) -> Iterator[NgramCounts]:
    """Yield the n-grams of 1, 2, ... ``longest`` tokens of all sentences."""
    numbers: dict[str, int] = {}
    tokens = np.array([numbers.setdefault(t, len(numbers)) for t in chain(*sentences)], dtype=np.int64)
    lengths = np.array([len(sentence) for sentence in sentences], dtype=np.int64)
    sentence = np.repeat(np.arange(len(sentences)), lengths)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(tokens))  # tokens to the end of the sentence
    starting = tokens  # the n-gram that starts at each token, where the sentence is long enough
    for n in range(1, longest + 1):
        places = np.flatnonzero(left >= n)
        extended = starting[places] * (len(numbers) + 1) + (tokens[places + n - 1] if n > 1 else 0)
        distinct, ngram = np.unique(extended, return_inverse=True)
        starting = np.zeros_like(tokens)
        starting[places] = ngram
        size = max(len(distinct), 1)
        entries, count = np.unique(sentence[places] * size + ngram, return_counts=True)
        yield NgramCounts(entries // size, entries % size, count, size)


def values_at(keys: np.ndarray, values: np.ndarray, requested: np.ndarray) -> np.ndarray:
    """Return the value of each requested key, 0 for those that are not there. keys: sorted and distinct."""
    if not len(keys):
        return np.zeros(len(requested), dtype=values.dtype)
    places = np.minimum(np.searchsorted(keys, requested), len(keys) - 1)
    return np.where(keys[places] == requested, values[places], 0)
