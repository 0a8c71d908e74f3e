"""One question and one answer: instruction, prompt and completion, visual question answering."""

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

from .dialogues import messages_of, system_of
from .schema import ParsedRow, Turn, images_of, videos_of


def read_alpaca(row: Row, where: str) -> ParsedRow:
    """instruction, an optional input on the next line, output."""
    question = nonempty_text_field(row, "instruction", where)
    more = optional_text(row, "input", where)
    user = Turn("user", question if more is None else f"{question}\n{more}", f"{where}: instruction")
    return _answered(
        [*system_of(row, where), user],
        _answer(nonempty_text_field(row, "output", where), f"{where}: output"),
        row,
        where,
    )


def read_prompt_completion(row: Row, where: str) -> ParsedRow:
    """prompt and completion, each text or a list of messages."""
    turns = [
        *text_or_messages(row, "prompt", "user", where),
        *text_or_messages(row, "completion", "assistant", where),
    ]
    return ParsedRow(turns, images_of(row, where), videos_of(row, where))


def read_vqa(row: Row, where: str) -> ParsedRow:
    """question and answer, or answers of several people: the most frequent one, the first of equally frequent ones."""
    question = Turn("user", nonempty_text_field(row, "question", where), f"{where}: question")
    name = "answer" if has_value(row, "answer") or not has_value(row, "answers") else "answers"
    answer = nonempty_text_field(row, name, where) if name == "answer" else _most_frequent(row, where)
    return _answered([*system_of(row, where), question], _answer(answer, f"{where}: {name}"), row, where)


def text_or_messages(row: Row, name: str, role: str, where: str) -> list[Turn]:
    """A field that is one message's text, or a list of messages."""
    if isinstance(row.get(name), list):
        return messages_of(row[name], f"{where}: {name}")
    text = nonempty_text_field(row, name, where)
    return [Turn(role, text, f"{where}: {name}")]


def _answered(turns: list[Turn], answer: Turn, row: Row, where: str) -> ParsedRow:
    return ParsedRow([*turns, answer], images_of(row, where), videos_of(row, where))


def _answer(text: str, where: str) -> Turn:
    """Words alone: in these schemas images belong to the question, and an answer that spells a marker is text."""
    return Turn("assistant", [{"type": "text", "text": text}], where)


def _most_frequent(row: Row, where: str) -> str:
    answers = [
        _one(answer, f"{where}: answers[{i}]") for i, answer in enumerate(list_field(row, "answers", where))
    ]
    if not answers:
        raise UserError(f"{where}: answers: found an empty list, wanted at least one answer")
    return Counter(answers).most_common(1)[0][0]


def _one(answer: Any, where: str) -> str:
    """An answer, or the object that VQAv2 wraps it in."""
    if isinstance(answer, Mapping):
        return nonempty_text_field(answer, "answer", where)
    return nonempty_text(answer, where)
