"""The tokenizer's call, for texts with text tags of tiles or with special tokens typed by a user too.

Other texts go to the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import shorten

from .compat import truncation_length
from .special_text import Span, Tokens, encode_text, restore
from .tile_tags import tile_tag_ids

# Options of a tokenizer's call: those of `tokenizer.pad`, and those that `tokenize` has no use for.
PADDING = ("padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")
NOT_SUPPORTED = (
    *("text_pair", "text_target", "text_pair_target", "max_target_length", "is_split_into_words", "stride"),
    *("return_overflowing_tokens", "return_special_tokens_mask", "return_length", "split_special_tokens"),
    *("sanitize_control_tokens", "tokenizer_kwargs"),
)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> dict[str, Any]:
    """Return ``tokenizer(texts, **options)`` with text tags of tiles, and typed special tokens as text.

    Raises UserError for options in `NOT_SUPPORTED`, unless the tokenizer itself can be called.
    """
    if not tile_tag_ids(tokenizer) and not any(restore(tokenizer, text)[1] for text in texts):
        return dict(tokenizer(list(texts), **options))
    _check_options(options)
    length = truncation_length(tokenizer, options)
    ends = _special_ends(tokenizer) if options.get("add_special_tokens", True) else ([], [])
    rows = [
        _finished(encode_text(tokenizer, text), ends, length, tokenizer.truncation_side) for text in texts
    ]
    unpadded = {"input_ids": [row.ids for row in rows]}
    types = options.get("return_token_type_ids")
    if types or (types is None and "token_type_ids" in tokenizer.model_input_names):
        unpadded["token_type_ids"] = [[0] * len(row.ids) for row in rows]
    padding: dict[str, Any] = {"padding": False} | {n: options[n] for n in PADDING if n in options}
    padded = dict(tokenizer.pad(unpadded, **padding, verbose=False))
    if options.get("return_offsets_mapping"):
        side = options.get("padding_side") or tokenizer.padding_side
        padded["offset_mapping"] = [
            _padded_offsets(row, len(ids), side) for row, ids in zip(rows, padded["input_ids"], strict=True)
        ]
    return padded


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise UserError for options of a tokenizer's call that `tokenize` would ignore."""
    for name in NOT_SUPPORTED:
        if options.get(name):
            raise UserError(
                f"processor: {name}: not supported for texts with text tags of tiles or with special tokens "
                f"typed by a user, got {shorten(str(options[name]))}; leave it out"
            )


def _finished(tokens: Tokens, ends: tuple[list[int], list[int]], length: int | None, side: str) -> Tokens:
    """Return the tokens of a text, truncated at a side, between the special tokens of its ends.

    length: the most tokens in all; None for no limit.
    """
    before, after = ends
    most = len(tokens.ids) if length is None else max(0, length - len(before) - len(after))
    first = max(0, len(tokens.ids) - most) if side == "left" else 0
    kept = slice(first, first + most)
    offsets = [(0, 0)] * len(before) + tokens.offsets[kept] + [(0, 0)] * len(after)
    return Tokens([*before, *tokens.ids[kept], *after], offsets)


def _special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer adds before a text and after it."""
    out = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = out["input_ids"], out["special_tokens_mask"]
    begin, end = mask.index(0), len(mask) - mask[::-1].index(0)
    return ids[:begin], ids[end:]


def _padded_offsets(tokens: Tokens, length: int, side: str) -> list[Span]:
    """Return the offsets, with (0, 0) for padding."""
    padding = [(0, 0)] * (length - len(tokens.offsets))
    return padding + tokens.offsets if side == "left" else tokens.offsets + padding
