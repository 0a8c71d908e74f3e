"""Rows of The Cauldron and FineVision: ``images``, and ``texts`` as pairs of user and assistant.

    {"images": [...], "texts": [{"user": "What is the date?", "assistant": "1 May", "source": "DocVQA"}]}

Both collect instruction datasets in one form (arXiv:2405.02246, arXiv:2510.17269). The images precede the
first question.
"""

from __future__ import annotations

from collections.abc import Mapping

from flamingo_ft.data.fields import Row, list_field, nonempty_text_field, type_name
from flamingo_ft.errors import UserError

from .schema import ParsedRow, Schema, Turn, images_of, register_schema


def parse_cauldron(row: Row, where: str) -> ParsedRow:
    """Parse the pairs of ``texts`` in order."""
    images = images_of(row, where)
    turns: list[Turn] = []
    for index, pair in enumerate(list_field(row, "texts", where)):
        place = f"{where}: texts[{index}]"
        if not isinstance(pair, Mapping):
            raise UserError(f"{place}: expected an object with user and assistant, got {type_name(pair)}")
        question = {"type": "text", "text": nonempty_text_field(pair, "user", place)}
        answer = {"type": "text", "text": nonempty_text_field(pair, "assistant", place)}
        media = [{"type": "image"} for _ in images] if index == 0 else []
        turns.append(Turn("user", [*media, question], f"{place}.user"))
        turns.append(Turn("assistant", [answer], f"{place}.assistant"))
    if not turns:
        raise UserError(
            f"{where}: texts: expected at least one pair of user and assistant, got an empty list"
        )
    return ParsedRow(turns, images)


def _is_cauldron(row: Row) -> bool:
    texts = row.get("texts")
    return isinstance(texts, list) and any(isinstance(pair, Mapping) for pair in texts)


register_schema(Schema("cauldron", fields=("texts",), matches=_is_cauldron, parse=parse_cauldron))
