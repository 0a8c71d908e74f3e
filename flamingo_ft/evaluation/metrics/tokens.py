"""A plain tokenization of captions, which needs no Java: lower case, without punctuation.

It is not that of the published figures, which is Stanford's PTB tokenizer (`java`): that one also splits
"isn't" and "dog's", among others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Tokens = Sequence[str]
Tokenizer = Callable[[Sequence[str]], Sequence[Tokens]]  # texts -> the tokens of each

_TOKEN = re.compile(r"\w+(?:[-.,'’]\w+)*|[^\w\s]")  # a word, a number such as 1,000.5, or another character
_PUNCTUATION = frozenset("'\"`.?!,:;-(){}‘’“”–—…")  # what the official evaluation of captions drops


def plain_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Return the tokens of each text, in lower case and without punctuation."""
    return [[token for token in _TOKEN.findall(text.lower()) if token not in _PUNCTUATION] for text in texts]


def tokenize_pairs(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: Tokenizer
) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Return the tokens of each prediction, and of each of its references; all are tokenized at once."""
    texts = [*predictions, *(reference for several in references for reference in several)]
    tokens = iter(tokenizer(texts))
    return [next(tokens) for _ in predictions], [[next(tokens) for _ in several] for several in references]
