"""A dialogue as its chat template writes it, and which characters are the assistant's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.errors import UserError
from flamingo_ft.model.chat_template import Span, is_marked, render
from flamingo_ft.model.processor import FlamingoProcessor, flatten
from flamingo_ft.model.special_text import encode_text


def write_dialogue(
    processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, list[Span]]:
    """The text of a dialogue, stand-ins for typed special tokens in it, and the characters with loss."""
    turns = [flatten(message, processor.tokenizer) for message in messages]
    speaking = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    silent = {index for index in speaking if turns[index].get("loss") is False}
    if is_marked(processor.chat_template):
        text, spans = _render(processor, turns, marked=True)
        return text, _without(spans, speaking, silent) if silent else spans
    text, _ = _render(processor, turns)
    return text, [_span(processor, turns, index, text) for index in speaking if index not in silent]


def write_prompt(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a dialogue up to where the assistant is to speak."""
    turns = [flatten(message, processor.tokenizer) for message in messages]
    return _render(processor, turns, add_generation_prompt=True)[0]


def is_rewritten(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether an answer with loss does not stand in the dialogue's ``text`` as it is, white space aside."""
    words, place = _without_space(text), 0
    for message in messages:
        if message["role"] == "assistant" and message.get("loss") is not False:
            answer = _without_space(flatten(message, processor.tokenizer)["content"])
            place = words.find(answer, place)
            if place < 0:
                return True
            place += len(answer)
    return False


def _without_space(text: str) -> str:
    return "".join(text.split())


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
    if text.startswith(through) and through.startswith(before):
        return len(before), len(through)
    return _span_by_marker(processor, turns, index, text, before)


def _span_by_marker(
    processor: FlamingoProcessor, turns: list[dict], index: int, text: str, before: str
) -> Span:
    """The span of a turn that the template writes otherwise when turns follow it: where another answer would stand."""
    marker = "qzanswer"
    while marker in text:
        marker += "z"
    replaced = [*turns[:index], {**turns[index], "content": marker}, *turns[index + 1 :]]
    head, found, tail = _render(processor, replaced)[0].partition(marker)
    head = before if text.startswith(before) else head.rstrip(" ")
    through = len(text) - len(tail)
    if not (found and text.endswith(tail) and len(tail) < len(text)):
        raise UserError(
            "chat template: cannot locate the assistant's answers (it rewrites earlier turns); mark them with "
            "{% generation %} in the tokenizer's chat template, or set data.template to flamingo"
        )
    if not (text.startswith(head) and len(head) <= through):
        raise UserError(
            "chat template: begins an answer otherwise than its prompt for answers does (with its reasoning, perhaps), "
            f"got it in message {index}; remove the reasoning from answers, or set data.template to flamingo"
        )
    alone = _render(processor, replaced[: index + 1])[0].rpartition(marker)[2]
    end = text[: through + _shared(processor, tail, alone)].rstrip()
    return len(head), max(len(head), len(end))


def _shared(processor: FlamingoProcessor, tail: str, end: str) -> int:
    """How many characters ``tail`` and ``end`` begin with alike, in whole tokens: an answer's end, whatever follows."""
    shared = 0
    ours, theirs = (encode_text(processor.tokenizer, text) for text in (tail[: len(end)], end))
    for token, other, (_, stop) in zip(ours.ids, theirs.ids, ours.offsets, strict=False):
        if token != other:
            break
        shared = stop
    return shared


def _render(processor: FlamingoProcessor, turns: list[dict], **options: bool) -> tuple[str, list[Span]]:
    return render(processor.answer_template, processor.tokenizer.special_tokens_map, turns, **options)
