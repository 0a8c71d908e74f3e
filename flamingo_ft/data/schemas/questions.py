"""A question with an answer (alpaca, prompt_completion, vqa), a labelled one, or a better and a worse one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from flamingo_ft.data.fields import (
    Row,
    bool_field,
    has_value,
    list_field,
    nonempty_text,
    nonempty_text_field,
    optional_text,
    usable_texts,
)
from flamingo_ft.errors import UserError

from .boxes import BOXES
from .dialogues import system_turns, turns_of_messages
from .schema import ParsedRow, Schema, Turn, has_columns, images_of, register_schema, videos_of


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
    """Parse question and answer, or the most frequent of ``answers`` (the first of them on a tie).

    All of ``answers`` are reference answers of evaluation.
    """
    question = Turn("user", nonempty_text_field(row, "question", where), f"{where}: question")
    name = "answer" if has_value(row, "answer") or not has_value(row, "answers") else "answers"
    if name == "answer":
        answer, others = nonempty_text_field(row, name, where), _usable_answers(row, where)
    else:
        others = _answers(row, where)
        answer = Counter(others).most_common(1)[0][0]
    if answer in others:
        others.remove(answer)
    turns = [*system_turns(row, where), question, _answer(answer, f"{where}: {name}")]
    return replace(_parsed(turns, row, where), other_answers=others)


def parse_preference(row: Row, where: str) -> ParsedRow:
    """Parse prompt, chosen and rejected, each text or messages.

    As in TRL, both answers may begin with the prompt.
    """
    chosen, rejected = (text_or_messages(row, name, "assistant", where) for name in ("chosen", "rejected"))
    prompt, chosen, rejected = _split_prompt(row, chosen, rejected, where)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[0].role != "assistant":
            raise UserError(f"{where}: {name}: no assistant message after the prompt; add the answer")
    if _text(chosen) == _text(rejected) and not has_value(row, BOXES):  # markers stand for different boxes
        raise UserError(f"{where}: rejected: the same as chosen; remove the row")
    turns = [*system_turns(row, where), *prompt, *chosen]
    return ParsedRow(turns, images_of(row, where), videos_of(row, where), rejected)


def parse_unpaired_preference(row: Row, where: str) -> ParsedRow:
    """Parse prompt and completion, each text or messages, and label: whether the completion is good."""
    return replace(parse_prompt_completion(row, where), label=bool_field(row, "label", where))


def text_or_messages(row: Row, name: str, role: str, where: str) -> list[Turn]:
    """Return a field that holds one message's text, or a list of messages."""
    if isinstance(row.get(name), list):
        return turns_of_messages(row[name], f"{where}: {name}")
    return [Turn(role, nonempty_text_field(row, name, where), f"{where}: {name}")]


def _parsed(turns: list[Turn], row: Row, where: str) -> ParsedRow:
    return ParsedRow(turns, images_of(row, where), videos_of(row, where))


def _answer(text: str, where: str) -> Turn:
    """Return an answer as a text block, in which ``<image>`` stays text: images belong to the question."""
    return Turn("assistant", [{"type": "text", "text": text}], where)


def _answers(row: Row, where: str) -> list[str]:
    answers = [
        _one_answer(answer, f"{where}: answers[{index}]")
        for index, answer in enumerate(list_field(row, "answers", where))
    ]
    if not answers:
        raise UserError(f"{where}: answers: expected at least one answer, got an empty list")
    return answers


def _usable_answers(row: Row, where: str) -> list[str]:
    """Return the ``answers`` beside an ``answer``.

    Training does not read them, so a row is not refused for what is wrong with them.
    """
    with suppress(UserError):
        entries = list_field(row, "answers", where)
        return usable_texts(entry.get("answer") if isinstance(entry, Mapping) else entry for entry in entries)
    return []


def _one_answer(answer: Any, where: str) -> str:
    """Return the text of an answer, which VQAv2 wraps in an object."""
    if isinstance(answer, Mapping):
        return nonempty_text_field(answer, "answer", where)
    return nonempty_text(answer, where)


def _is_vqa(row: Row) -> bool:
    return "question" in row and ("answer" in row or "answers" in row)


def _split_prompt(
    row: Row, chosen: list[Turn], rejected: list[Turn], where: str
) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """Return the prompt and both answers without it."""
    answers_hold_prompt = bool(chosen) and chosen[0].role != "assistant"
    if has_value(row, "prompt") and not answers_hold_prompt:
        return text_or_messages(row, "prompt", "user", where), chosen, rejected
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours.role == "assistant" or _text([ours]) != _text([theirs]):
            break
        shared += 1
    if not shared:
        raise UserError(
            f"{where}: prompt: missing; give the text or messages that chosen and rejected answer"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _text(turns: Sequence[Turn]) -> list[tuple]:
    return [(turn.role, turn.content) for turn in turns]


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
register_schema(
    Schema(
        "preference",
        fields=("prompt", "chosen", "rejected", "system"),
        matches=has_columns("chosen", "rejected"),
        parse=parse_preference,
        is_preference=True,
    )
)
register_schema(
    Schema(
        "unpaired_preference",
        fields=("prompt", "completion", "label"),
        matches=has_columns("prompt", "completion", "label"),
        parse=parse_unpaired_preference,
        has_label=True,
    )
)
