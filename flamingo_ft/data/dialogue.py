"""A dialogue as its chat template writes it, and which characters are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor, flatten

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]


def write_dialogue(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
    """The text of a dialogue, stand-ins for typed special tokens in it, and the characters with loss."""
    turns = [flatten(message, processor.tokenizer) for message in messages]
    speaking = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    silent = {index for index in speaking if turns[index].get("loss") is False}
    if GENERATION_MARK.search(processor.chat_template):
        text, spans = _render(processor, turns, marked=True)
        return text, _without(spans, speaking, silent) if silent else spans
    text, _ = _render(processor, turns)
    return text, [_span(processor, turns, index, text) for index in speaking if index not in silent]


def write_prompt(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a dialogue up to where the assistant is to speak."""
    turns = [flatten(message, processor.tokenizer) for message in messages]
    return _render(processor, turns, add_generation_prompt=True)[0]


def _without(spans: list[Span], speaking: list[int], silent: set[int]) -> list[Span]:
    """The spans of the turns that are learned."""
    if len(spans) != len(speaking):
        raise UserError(
            f"chat template: marks {len(spans)} parts as the assistant's among {len(speaking)} such turns, "
            "so it cannot be told which is the one without loss; use a template that marks each turn once"
        )
    return [span for span, index in zip(spans, speaking, strict=True) if index not in silent]


def _span(processor: FlamingoProcessor, turns: list[dict], index: int, text: str) -> Span:
    """Where assistant turn ``index`` stands in ``text``, from its first word to its end token."""
    before, _ = _render(processor, turns[:index], add_generation_prompt=True)
    through, _ = _render(processor, turns[: index + 1])
    through = through.rstrip()
    if not (text.startswith(through) and through.startswith(before)):
        raise UserError(
            "chat template: cannot tell the assistant's words from the rest (it rewrites earlier turns); "
            "mark them with {% generation %} in the tokenizer's chat template"
        )
    return len(before), len(through)


def _render(
    processor: FlamingoProcessor, turns: list[dict], marked: bool = False, add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    """A dialogue as the chat template writes it, and the spans that its generation marks enclose, if asked for.

    transformers' own token mask is not used: it misses the last bytes of a span that ends in a character of several
    tokens.
    """
    try:
        texts, spans = render_jinja_template(
            conversations=[turns],
            chat_template=processor.chat_template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **processor.tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"chat template: refuses the dialogue ({problem}); change its roles or the template") from None
    return texts[0], spans[0] if marked else []
