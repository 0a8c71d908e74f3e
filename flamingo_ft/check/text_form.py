"""How dialogues are written and where answers stop: the same tokens in training and at inference, shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from flamingo_ft.adapters.answering import stopping_ids
from flamingo_ft.data.render import render_dialogue, render_prompt
from flamingo_ft.data.sample import text_message
from flamingo_ft.errors import UserError
from flamingo_ft.model import FlamingoProcessor
from flamingo_ft.model.special_text import encode_text

QUESTION, ANSWER = "qzask", "qzsay"  # words that no template holds
LONGEST_SHOWN = 160  # characters


@dataclass(frozen=True)
class Piece:
    """A part of the text that the template writes, and its tokens as the vocabulary names them."""

    text: str
    tokens: list[str]


@dataclass(frozen=True)
class TextForm:
    """What stands around a question and its answer.

    begins: before the first question. prompt: between a question and its answer, in training and at inference. ends:
    after an answer, with loss; follows: after that, without. stops: the tokens of which each ends generation.
    learns_to_stop: whether an answer's end, with loss, holds one of them.
    """

    begins: Piece
    prompt: Piece
    ends: Piece
    follows: Piece
    stops: list[str]
    learns_to_stop: bool

    @property
    def lines(self) -> list[str]:
        """The same in words."""
        ends = f"end with {_quoted(self.ends.text)}" if self.ends.text else "have no end"
        follows = f" (then {_quoted(self.follows.text)}, without loss)" if self.follows.text else ""
        return [
            f"dialogues begin with {_quoted(self.begins.text)}; {_quoted(self.prompt.text)} stands before answers, "
            f"which {ends}{follows}",
            f"generation stops at {' or '.join(self.stops) or 'nothing'}",
        ]

    @property
    def warning(self) -> str | None:
        """What is wrong with it, if anything."""
        if self.learns_to_stop:
            return None
        return (
            "the chat template ends answers with no token that stops generation: answers run on until "
            "eval.max_new_tokens; set data.template to flamingo"
        )


def text_form(processor: FlamingoProcessor, own_ends: int | Sequence[int] | None) -> TextForm | None:
    """Of the processor's chat template; None for one that writes its texts in another form than they have.

    own_ends: the end tokens of the language model's own generation configuration.
    """
    messages = [text_message("user", QUESTION), text_message("assistant", ANSWER)]
    try:
        text, spans = render_dialogue(processor, messages)
        prompt = render_prompt(processor, messages[:1])
    except UserError:
        return None
    if text.count(QUESTION) != 1 or text.count(ANSWER) != 1 or not text.startswith(prompt) or not spans:
        return None
    asked, said = text.index(QUESTION), text.index(ANSWER) + len(ANSWER)
    learned = max(said, spans[-1][1])
    places = [(0, asked), (asked + len(QUESTION), len(prompt)), (said, learned), (learned, len(text))]
    begins, asks, ends, follows = (_piece(processor, text, *place) for place in places)
    stops = processor.tokenizer.convert_ids_to_tokens(stopping_ids(processor, own_ends))
    return TextForm(begins, asks, ends, follows, stops, not set(stops).isdisjoint(ends.tokens))


def _piece(processor: FlamingoProcessor, text: str, begin: int, end: int) -> Piece:
    tokens = encode_text(processor.tokenizer, text)
    pairs = zip(tokens.ids, tokens.offsets, strict=True)
    inside = [token for token, (a, b) in pairs if begin <= a < b <= end]
    return Piece(text[begin:end], processor.tokenizer.convert_ids_to_tokens(inside))


def _quoted(text: str) -> str:
    """A text on one line, without the middle of a long system prompt."""
    text = (
        text
        if len(text) <= LONGEST_SHOWN
        else f"{text[: LONGEST_SHOWN // 2]} ... {text[-LONGEST_SHOWN // 2 :]}"
    )
    return json.dumps(text, ensure_ascii=False)
