"""From a dialogue to token ids and labels: loss on what the assistant says and its end token, nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from flamingo_ft.errors import UserError
from flamingo_ft.model.processor import FlamingoProcessor, flatten

IGNORED = -100  # the label that carries no loss, as in torch's cross-entropy
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one dialogue (T,) and their labels (T,), `IGNORED` wherever there is no loss."""

    input_ids: list[int]
    labels: list[int]


def encode(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> Encoded:
    """Token ids and labels of a whole dialogue.

    Where the chat template marks what the assistant generates, its marks decide; otherwise the assistant's part
    is what each of its turns adds to the text before it. A media token never has a label. Raises UserError for a
    template that refuses the dialogue or hides the assistant's part, and for a tokenizer without offsets.
    """
    turns = [flatten(message) for message in messages]
    marked = GENERATION_MARK.search(processor.chat_template) is not None
    text, spans = _render(processor, turns, marked=marked)
    if not marked:
        spans = [_span(processor, turns, i, text) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    ids, offsets = _tokens_with_offsets(processor, text)
    said = [any(a < end and b > start for start, end in spans) for a, b in offsets]
    labels = [
        token if learned and token != processor.image_token_id else IGNORED
        for token, learned in zip(ids, said, strict=True)
    ]
    return Encoded(ids, labels)


def encode_prompt(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a dialogue up to where the assistant is to speak."""
    text, _ = _render(processor, [flatten(message) for message in messages], add_generation_prompt=True)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def end_token_id(processor: FlamingoProcessor) -> int | None:
    """The token with which the chat template ends what the assistant says; None where it is an ordinary word."""
    labels = encode(processor, [text_message("user", "a"), text_message("assistant", "a")]).labels
    last = [token for token in labels if token != IGNORED][-1]
    return last if last in processor.tokenizer.added_tokens_decoder else None


def text_message(role: str, text: str) -> dict[str, Any]:
    """A message of words alone."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: Mapping[str, Any]) -> str:
    """The words of a message, without its images."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _span(processor: FlamingoProcessor, turns: list[dict], index: int, text: str) -> tuple[int, int]:
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
) -> tuple[str, list[tuple[int, int]]]:
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


def _tokens_with_offsets(processor: FlamingoProcessor, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and the characters that each stands for."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise UserError(
            f"tokenizer {name}: does not tell which characters a token stands for; use a model with a fast tokenizer"
        )
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return out["input_ids"], out["offset_mapping"]
