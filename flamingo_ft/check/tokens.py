"""Token ids to text that can be shown token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flamingo_ft.data.encode import IGNORED
from flamingo_ft.model import FlamingoProcessor

UNFINISHED = "\ufffd"  # what bytes decode to that are not yet a whole character


@dataclass(frozen=True)
class Token:
    """text: what it adds to the text before it; empty for all but the last of a character's tokens. name: as the
    vocabulary has it. special: no ordinary text."""

    id: int
    text: str
    name: str
    learned: bool
    media: bool
    special: bool


def shown_tokens(
    processor: FlamingoProcessor, input_ids: Sequence[int], labels: Sequence[int]
) -> list[Token]:
    """Every token of a sample, special ones too."""
    tokenizer = processor.tokenizer
    names = tokenizer.convert_ids_to_tokens(input_ids)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [
        Token(token, text, str(name), label != IGNORED, token == processor.image_token_id, token in special)
        for token, text, name, label in zip(
            input_ids, _texts(processor, input_ids), names, labels, strict=True
        )
    ]


def _texts(processor: FlamingoProcessor, ids: Sequence[int]) -> Iterator[str]:
    """What each token adds. Decoded with those before it: alone, some tokenizers drop its space."""
    begin = done = 0
    for end in range(1, len(ids) + 1):
        before, through = _decoded(processor, ids[begin:done]), _decoded(processor, ids[begin:end])
        if through.endswith(UNFINISHED) and end < len(ids):
            yield ""
            continue
        yield through[len(before) :]
        begin, done = done, end


def _decoded(processor: FlamingoProcessor, ids: Sequence[int]) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
