"""Preference pairs: a prompt, and a better and a worse answer."""

from __future__ import annotations

from collections.abc import Sequence

from flamingo_ft.data.fields import Row, has_value
from flamingo_ft.errors import UserError

from .dialogues import system_turns
from .questions import text_or_messages
from .registry import register_schema
from .schema import ParsedRow, Schema, Turn, has_columns, images_of, videos_of


def parse_preference(row: Row, where: str) -> ParsedRow:
    """Parse prompt, chosen and rejected, each text or messages; as in TRL, both answers may begin with the
    prompt."""
    chosen, rejected = (text_or_messages(row, name, "assistant", where) for name in ("chosen", "rejected"))
    prompt, chosen, rejected = _split_prompt(row, chosen, rejected, where)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[0].role != "assistant":
            raise UserError(f"{where}: {name}: no assistant message after the prompt; add the answer")
    if _text(chosen) == _text(rejected):
        raise UserError(f"{where}: rejected: the same as chosen; remove the row")
    turns = [*system_turns(row, where), *prompt, *chosen]
    return ParsedRow(turns, images_of(row, where), videos_of(row, where), rejected)


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
        "preference",
        fields=("prompt", "chosen", "rejected", "system"),
        matches=has_columns("chosen", "rejected"),
        parse=parse_preference,
        is_preference=True,
    )
)
