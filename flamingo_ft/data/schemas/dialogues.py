"""Dialogues: `messages` as OpenAI and TRL write them, LLaVA's and ShareGPT's `conversations`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flamingo_ft.data.fields import Row, given, kind, list_field, optional_text
from flamingo_ft.data.sample import ROLES
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

from .blocks import unread_block_keys
from .draft import Draft, Turn
from .media_fields import images_of, videos_of
from .turn_keys import is_learned, unread_texts

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# LLaVA writes its marker on a line of its own, before or after the question; the line break belongs to the marker.
MARKER_LINE = re.compile(rf"{re.escape(MEDIA_TOKEN)}\n|\n{re.escape(MEDIA_TOKEN)}$")


def read_messages(row: Row, where: str) -> Draft:
    turns = messages_of(list_field(row, "messages", where), f"{where}: messages")
    return Draft(turns, images_of(row, where), videos_of(row, where))


def read_sharegpt(row: Row, where: str) -> Draft:
    """`conversations` of from and value, or of role and content, with an optional ``system``."""
    turns = conversation_of(row, where)
    return Draft([*system_of(row, where), *turns], images_of(row, where), videos_of(row, where))


def read_llava(row: Row, where: str) -> Draft:
    """`conversations` of human and gpt."""
    turns = [
        replace(turn, content=MARKER_LINE.sub(MEDIA_TOKEN, turn.content))
        if isinstance(turn.content, str)
        else turn
        for turn in conversation_of(row, where)
    ]
    return Draft(turns, images_of(row, where), videos_of(row, where))


def conversation_of(row: Row, where: str) -> list[Turn]:
    turns = list_field(row, "conversations", where)
    place = f"{where}: conversations"
    if not turns or any(isinstance(turn, Mapping) and given(turn, "role") for turn in turns):
        return messages_of(turns, place)
    return [_spoken(turn, f"{place}[{index}]") for index, turn in enumerate(turns)]


def messages_of(messages: list, where: str) -> list[Turn]:
    if not messages:
        raise UserError(f"{where}: found no assistant turn, wanted one to learn from")
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(messages)]


def system_of(row: Row, where: str) -> list[Turn]:
    """The system message of schemas that keep it in a field of its own."""
    text = optional_text(row, "system", where)
    return [] if text is None else [Turn("system", [{"type": "text", "text": text}], f"{where}: system")]


def _message(message: Any, where: str) -> Turn:
    _check_keys(message, ("role", "content"), where)
    if message["role"] not in ROLES:
        raise UserError(f"{where}.role: found {message['role']!r}, wanted one of {', '.join(ROLES)}")
    return _turn(message, message["role"], ("role", "content"), where)


def _spoken(turn: Any, where: str) -> Turn:
    _check_keys(turn, ("from", "value"), where)
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise UserError(f"{where}.from: found {speaker!r}, wanted human, gpt or system")
    return _turn(turn, SPEAKERS[speaker], ("from", "value"), where)


def _turn(message: Mapping[str, Any], role: str, keys: tuple[str, str], where: str) -> Turn:
    _, content = keys
    place = f"{where}.{content}"
    if len(message) == len(keys) and isinstance(
        message[content], str
    ):  # most messages: there is nothing else in them
        return Turn(role, message[content], place)
    field = where.rpartition(": ")[2].partition("[")[0]
    unread = [f"{field}[].{key}" for key in unread_texts(message, keys, where)]
    unread += [f"{field}[].{content}[].{key}" for key in unread_block_keys(message[content], place)]
    return Turn(role, message[content], place, is_learned(message, role, where), unread)


def _check_keys(turn: Any, keys: tuple[str, str], where: str) -> None:
    wanted = f"wanted an object with {' and '.join(keys)}"
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: found {kind(turn)}, {wanted}")
    lacking = [key for key in keys if key not in turn]
    if lacking:
        raise UserError(f"{where}: found no {lacking[0]}, {wanted}")
