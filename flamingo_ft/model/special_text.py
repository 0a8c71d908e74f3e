"""Keep special tokens typed by a user as text, so that they neither insert an image nor end an answer.

Before a chat template renders a dialogue, each such string in its text is replaced by a placeholder of the
same length, a run of private-use characters. The rendered text may be cut and joined, as trainers do. On
tokenization the strings are restored, and the text around them is tokenized without special tokens. The text
tags of tiles (`tile_tags`) are inserted last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from flamingo_ft.errors import UserError

from .added_tokens import MEDIA_TOKEN, token_id
from .tile_tags import tile_tag_ids

# The last plane of Unicode is for private use. A placeholder begins with FIRST + its special token's number.
FIRST, FILLER = 0x100000, "\U0010fffd"
PLACEHOLDER = re.compile("[\U00100000-\U0010fffc]")

Span = tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """Token ids (T,) of a text, and the span of characters (start, end) of each."""

    ids: list[int]
    offsets: list[Span]


def protect(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the text with a placeholder for every special token that is spelled in it."""
    specials = _specials(tokenizer, len(tokenizer))
    return specials.pattern.sub(lambda match: specials.placeholders[match[0]], text)


def restore(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, list[Span]]:
    """Return the text with its placeholders replaced by the special tokens' strings, and their spans."""
    if not PLACEHOLDER.search(text):
        return text, []
    specials = _specials(tokenizer, len(tokenizer))
    spans = [match.span() for match in specials.placeholder_pattern.finditer(text)]
    return specials.placeholder_pattern.sub(lambda match: specials.literals[match[0]], text), spans


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokenize a text, reading typed special tokens as plain text. Raises UserError for a slow tokenizer.

    No special tokens are added to its ends. If the tokenizer has text tags of tiles, they follow each media
    token, without characters of their own.
    """
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise UserError(
            f"tokenizer {name}: has no character offsets; use a language model with a fast tokenizer"
        )
    text, typed = restore(tokenizer, text)
    tokens = _encode(tokenizer, text)
    if typed:
        tokens = _with_typed_as_text(tokenizer, text, typed, tokens)
    return _with_tile_tags(tokenizer, tokens)


def _with_tile_tags(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> Tokens:
    tags = tile_tag_ids(tokenizer)
    if not tags:
        return tokens
    media, pairs = token_id(tokenizer, MEDIA_TOKEN), []
    for token, span in zip(tokens.ids, tokens.offsets, strict=True):
        pairs.append((token, span))
        if token == media:
            pairs += [(tag, (span[1], span[1])) for tag in tags]
    return Tokens([token for token, _ in pairs], [span for _, span in pairs])


def _with_typed_as_text(
    tokenizer: PreTrainedTokenizerBase, text: str, typed: list[Span], tokens: Tokens
) -> Tokens:
    """Retokenize as plain text each stretch between real special tokens that contains a typed one."""
    pairs = list(zip(tokens.ids, tokens.offsets, strict=True))
    kept, token, begin = [], 0, 0
    for place in [*_genuine(tokenizer, text, typed, pairs), len(pairs)]:
        first, last = pairs[place][1] if place < len(pairs) else (len(text), len(text))
        kept += (
            _stretch(tokenizer, text, (begin, first), typed, pairs[token:place]) + pairs[place : place + 1]
        )
        token, begin = place + 1, max(begin, last)
    return Tokens([each for each, _ in kept], [span for _, span in kept])


def _genuine(
    tokenizer: PreTrainedTokenizerBase, text: str, typed: list[Span], pairs: list[tuple[int, Span]]
) -> list[int]:
    """Return the indices of special tokens that were not typed.

    A special token whose string is not in the text stands for other characters (a byte) and does not count.
    """
    literals = _specials(tokenizer, len(tokenizer)).by_id
    return [
        place
        for place, (token, (a, b)) in enumerate(pairs)
        if token in literals and literals[token] in text[a:b] and not _overlaps((a, b), typed)
    ]


def _stretch(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    where: Span,
    typed: list[Span],
    tokens: list[tuple[int, Span]],
) -> list[tuple[int, Span]]:
    """Return the tokens between two real special tokens, retokenized as plain text if some were typed."""
    if not tokens or not _overlaps(where, typed):
        return tokens
    begin, words = where[0], text[slice(*where)]
    first = None if _overlaps(tokens[0][1], typed) else tokens[0][0]
    plain = _as_text(tokenizer, words, begin == 0, first)
    return [(token, (a + begin, b + begin)) for token, (a, b) in zip(plain.ids, plain.offsets, strict=True)]


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str, begins: bool, first: int | None) -> Tokens:
    """Tokenize a piece of text without special tokens.

    begins: the piece is the beginning of the text, where some tokenizers add a space. first: the first token
    of the piece in its context, if known.
    """
    alone = _encode(tokenizer, text, split_special_tokens=True)
    if begins or (first is not None and alone.ids[0] == first):
        return alone
    inside = _encode(tokenizer, "\n" + text, split_special_tokens=True)
    pairs = [pair for pair in zip(inside.ids, inside.offsets, strict=True) if pair[1][1] > 1]
    if pairs[0][1][0] < 1:  # the line break was merged into the first token
        return alone
    return Tokens([token for token, _ in pairs], [(a - 1, b - 1) for _, (a, b) in pairs])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> Tokens:
    out = tokenizer(
        text, **{"add_special_tokens": False, **options}, return_offsets_mapping=True, verbose=False
    )
    return Tokens(out["input_ids"], out["offset_mapping"])


def _overlaps(span: Span, others: Sequence[Span]) -> bool:
    return any(span[0] < end and span[1] > start for start, end in others)


@dataclass(frozen=True)
class _Specials:
    """A tokenizer's special tokens: their strings by id, and the placeholder of each."""

    by_id: dict[int, str]
    placeholders: dict[str, str]
    literals: dict[str, str]
    pattern: re.Pattern[str]
    placeholder_pattern: re.Pattern[str]


@lru_cache(maxsize=4)
def _specials(tokenizer: PreTrainedTokenizerBase, size: int) -> _Specials:
    """Return the special tokens.

    size: vocabulary size, part of the cache key so that added tokens are seen.
    """
    by_id = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    numbered = enumerate(by_id[index] for index in sorted(by_id))
    placeholders = {
        literal: chr(FIRST + number) + FILLER * (len(literal) - 1) for number, literal in numbered
    }
    literals = {placeholder: literal for literal, placeholder in placeholders.items()}
    return _Specials(by_id, placeholders, literals, _any_of(placeholders), _any_of(literals))


def _any_of(strings: dict[str, str]) -> re.Pattern[str]:
    """Return a pattern for the longest matching string; without strings, it never matches."""
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)")
