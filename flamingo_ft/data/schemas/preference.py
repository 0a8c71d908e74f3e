"""Preference pairs: a prompt, and a better and a worse answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from flamingo_ft.data.fields import Row, has_value
from flamingo_ft.errors import UserError

from .dialogues import system_of
from .questions import text_or_messages
from .schema import ParsedRow, Turn, images_of, videos_of


def read_preference(row: Row, where: str) -> ParsedRow:
    """prompt, chosen and rejected, each text or messages; a prompt may stand in both answers instead, as in TRL."""
    chosen, rejected = (text_or_messages(row, name, "assistant", where) for name in ("chosen", "rejected"))
    prompt, chosen, rejected = _prompt_and_answers(row, chosen, rejected, where)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[0].role != "assistant":
            raise UserError(
                f"{where}: {name}: found no answer of the assistant's, wanted one after the prompt"
            )
    if _told(chosen) == _told(rejected):
        raise UserError(f"{where}: rejected: found the same as chosen, wanted a worse answer; remove the row")
    return ParsedRow(
        [*system_of(row, where), *prompt, *chosen], images_of(row, where), videos_of(row, where), rejected
    )


def _prompt_and_answers(
    row: Row, chosen: list[Turn], rejected: list[Turn], where: str
) -> tuple[list[Turn], list[Turn], list[Turn]]:
    whole = (
        chosen and chosen[0].role != "assistant"
    )  # the prompt stands in the answers, whether in ``prompt`` too or not
    if has_value(row, "prompt") and not whole:
        return text_or_messages(row, "prompt", "user", where), chosen, rejected
    pairs = zip(chosen, rejected, strict=False)
    shared = len(
        list(
            takewhile(lambda pair: _told(pair[:1]) == _told(pair[1:]) and pair[0].role != "assistant", pairs)
        )
    )
    if not shared:
        raise UserError(
            f"{where}: prompt: found none, wanted text or messages that chosen and rejected answer"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _told(turns: Sequence[Turn]) -> list[tuple]:
    return [(turn.role, turn.content) for turn in turns]
