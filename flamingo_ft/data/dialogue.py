"""A dialogue as its chat template writes it, and which characters are the assistant's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_ft.errors import UserError
from flamingo_ft.model.chat_template import Span, is_marked, render
from flamingo_ft.model.processor import FlamingoProcessor, flatten


def write_dialogue(processor: FlamingoProcessor, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
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


def _span_by_marker(processor: FlamingoProcessor, turns: list[dict], index: int, text: str, before: str) -> Span:
    """The span of a turn that the template writes otherwise when turns follow it: where another answer would stand."""
    marker = "qzanswer"
    while marker in text:
        marker += "z"
    replaced = [*turns[:index], {**turns[index], "content": marker}, *turns[index + 1 :]]
    head, found, tail = _render(processor, replaced)[0].partition(marker)
    head = before if text.startswith(before) else head.rstrip(" ")
    through = len(text) - len(tail)
    if not (found and text.startswith(head) and text.endswith(tail) and len(head) <= through):
        raise UserError(
            "chat template: cannot locate the assistant's answers (it rewrites earlier turns); mark them with "
            "{% generation %} in the tokenizer's chat template, or set data.template to flamingo"
        )
    end = _render(processor, replaced[: index + 1])[0].rpartition(marker)[2].rstrip()
    end = end if tail.startswith(end) else ""
    return len(head), through + len(end) if end else max(len(head), len(text[:through].rstrip()))


def _render(processor: FlamingoProcessor, turns: list[dict], **options: bool) -> tuple[str, list[Span]]:
    return render(processor.answer_template, processor.tokenizer.special_tokens_map, turns, **options)
