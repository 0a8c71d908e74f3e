"""ROUGE-L of captions, as pycocoevalcap defines it."""

from __future__ import annotations

from collections.abc import Sequence

from .sequences import lcs_length
from .tokens import Tokens

BETA = 1.2  # how much more recall counts than precision


def rouge_l(prediction: Tokens, references: Sequence[Tokens]) -> float:
    """Return the ROUGE-L of a prediction, 0..1.

    F = (1 + b^2) P R / (R + b^2 P), b = 1.2, of the longest common subsequence: P is its share of the
    prediction, R of the reference (Lin, 2004, aclanthology.org/W04-1013). As in pycocoevalcap, P and R are
    each the largest over the references, and an empty text counts as one token.
    """
    tokens = prediction or [""]
    lengths = [(lcs_length(tokens, reference or [""]), len(reference) or 1) for reference in references]
    precision = max(common / len(tokens) for common, _ in lengths)
    recall = max(common / length for common, length in lengths)
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
