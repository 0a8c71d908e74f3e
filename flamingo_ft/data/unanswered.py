"""Rows without an answer: the formats of training data describe questions with answers, generation asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .fields import Row, has_value, is_blank
from .schemas.columns import normalize_name

UNANSWERED = "\N{REPLACEMENT CHARACTER}unanswered"  # in place of the answer that a row does not have
TURNS = ("messages", "conversations")
# A column of questions, the column of its answers, and others that hold one.
ANSWERS = (
    ("question", "answer", ("answers",)),
    ("instruction", "output", ("answer",)),
    ("prompt", "completion", ("chosen", "rejected")),
)
MEDIA = ("image", "images", "video", "videos", "jpg", "png")
TEXTS = ("caption", "text", "captions", "label", "texts", "text_list")


def answer_filler(question: str | None, columns: Mapping[str, str]) -> Callable[[Any], Any]:
    """Return a function that gives a row the answer `UNANSWERED` if it has none.

    A row of images alone is asked ``question``; without one, its answer is a caption. columns: those of
    fields with another name.
    """

    def fill(row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        names = {normalize_name(name): name for name in row} | dict(columns)
        missing = _missing(row, question, names)
        return {**row, **{names.get(field, field): value for field, value in missing.items()}}

    return fill


def _missing(row: Row, question: str | None, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that a row lacks. columns: by field."""
    names = {field: column for field, column in columns.items() if has_value(row, column)}
    for turns in (names[name] for name in TURNS if name in names):
        value = row[turns]
        return {turns: [*value, _answer_to(value[-1])]} if _ends_with_question(value) else {}
    for asked, answer, others in ANSWERS:
        if asked in names:
            answered = (names[name] for name in (answer, *others) if name in names)
            return {answer: UNANSWERED} if all(is_blank(row[column]) for column in answered) else {}
    if any(name in names for name in MEDIA) and not any(name in names for name in TEXTS):
        filled = {"caption": UNANSWERED}
        return filled if question is None else {"question": question, "answer": UNANSWERED}
    return {}


def _ends_with_question(turns: Any) -> bool:
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
        return False
    return turns[-1].get("role", turns[-1].get("from")) in ("user", "human")


def _answer_to(turn: Mapping[str, Any]) -> dict[str, str]:
    """Return an answer written like the turn before it."""
    if "role" in turn:
        return {"role": "assistant", "content": UNANSWERED}
    return {"from": "gpt", "value": UNANSWERED}
