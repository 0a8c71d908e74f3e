"""One question and one answer: alpaca, prompt_completion and vqa."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from flamingo_ft.data.fields import (
    Row,
    has_value,
    list_field,
    nonempty_text,
    nonempty_text_field,
    optional_text,
)
from flamingo_ft.errors import UserError

from .dialogues import system_turns, turns_of_messages
from .registry import register_schema
from .schema import ParsedRow, Schema, Turn, has_columns, images_of, videos_of


def parse_alpaca(row: Row, where: str) -> ParsedRow:
    """Parse instruction, an optional input on the next line, and output."""
    question = nonempty_text_field(row, "instruction", where)
    more = optional_text(row, "input", where)
    user = Turn("user", question if more is None else f"{question}\n{more}", f"{where}: instruction")
    answer = _answer(nonempty_text_field(row, "output", where), f"{where}: output")
    return _parsed([*system_turns(row, where), user, answer], row, where)


def parse_prompt_completion(row: Row, where: str) -> ParsedRow:
    """Parse prompt and completion, each text or a list of messages."""
    prompt = text_or_messages(row, "prompt", "user", where)
    return _parsed([*prompt, *text_or_messages(row, "completion", "assistant", where)], row, where)


def parse_vqa(row: Row, where: str) -> ParsedRow:
    """Parse question and answer. Of several people's answers: the most frequent, the first one on a tie."""
    question = Turn("user", nonempty_text_field(row, "question", where), f"{where}: question")
    name = "answer" if has_value(row, "answer") or not has_value(row, "answers") else "answers"
    answer = nonempty_text_field(row, name, where) if name == "answer" else _most_frequent(row, where)
    return _parsed([*system_turns(row, where), question, _answer(answer, f"{where}: {name}")], row, where)


def text_or_messages(row: Row, name: str, role: str, where: str) -> list[Turn]:
    """Return a field that holds one message's text, or a list of messages."""
    if isinstance(row.get(name), list):
        return turns_of_messages(row[name], f"{where}: {name}")
    return [Turn(role, nonempty_text_field(row, name, where), f"{where}: {name}")]


def _parsed(turns: list[Turn], row: Row, where: str) -> ParsedRow:
    return ParsedRow(turns, images_of(row, where), videos_of(row, where))


def _answer(text: str, where: str) -> Turn:
    """Return an answer as a text block: in these schemas images belong to the question, so ``<image>`` in
    it is text."""
    return Turn("assistant", [{"type": "text", "text": text}], where)


def _most_frequent(row: Row, where: str) -> str:
    answers = [
        _one_answer(answer, f"{where}: answers[{index}]")
        for index, answer in enumerate(list_field(row, "answers", where))
    ]
    if not answers:
        raise UserError(f"{where}: answers: expected at least one answer, got an empty list")
    return Counter(answers).most_common(1)[0][0]


def _one_answer(answer: Any, where: str) -> str:
    """Return an answer, which VQAv2 wraps in an object."""
    if isinstance(answer, Mapping):
        return nonempty_text_field(answer, "answer", where)
    return nonempty_text(answer, where)


def _is_vqa(row: Row) -> bool:
    return "question" in row and ("answer" in row or "answers" in row)


register_schema(
    Schema(
        "alpaca",
        fields=("instruction", "input", "output", "system"),
        matches=has_columns("instruction", "output"),
        parse=parse_alpaca,
    )
)
register_schema(
    Schema(
        "prompt_completion",
        fields=("prompt", "completion"),
        matches=has_columns("prompt", "completion"),
        parse=parse_prompt_completion,
    )
)
register_schema(
    Schema(
        "vqa",
        fields=("question", "answer", "answers", "system"),
        matches=_is_vqa,
        parse=parse_vqa,
    )
)
