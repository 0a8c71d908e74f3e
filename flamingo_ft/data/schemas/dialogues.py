"""Dialogues: ``messages`` as OpenAI and TRL write them, LLaVA's and ShareGPT's ``conversations``.

Toolkits mark an assistant message that is not trained on in several ways, all of which are read:

    loss: false               ms-swift, this package
    weight: 0                 OpenAI, Mistral, Axolotl's ShareGPT
    train or training: false  Axolotl (`message_field_training`)
    loss_scale: 0             ms-swift
    loss_mask, loss_weight: 0 others
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from flamingo_ft.data.fields import (
    Row,
    has_content,
    has_value,
    list_field,
    optional_text,
    texts_in,
    type_name,
)
from flamingo_ft.data.sample import ROLES
from flamingo_ft.errors import UserError
from flamingo_ft.model.added_tokens import MEDIA_TOKEN

from .build_sample import CONTENT_KEYS
from .schema import ParsedRow, Schema, Turn, has_columns, images_of, register_schema, videos_of

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# LLaVA writes its marker on a line of its own, before or after the question, so the line break belongs to it.
MARKER_LINE = re.compile(rf"{re.escape(MEDIA_TOKEN)}\n|\n{re.escape(MEDIA_TOKEN)}$")

FLAGS = ("loss", "train", "training", "loss_mask")  # true or false, or 1 or 0
WEIGHTS = ("weight", "loss_weight", "loss_scale")  # 1 or 0
LOSS_KEYS = (*FLAGS, *WEIGHTS)
# These select parts of a message, or mean the opposite of the others.
UNSUPPORTED_LOSS = ("train_detail", "training_detail", "mask", "masked")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
MEDIA = ("image", "images", "video", "videos")
# Parts of a message that samples have no place for.
UNSUPPORTED = (
    *REASONING,
    "tool_calls",
    "function_call",
    "tool_call_id",
    "tools",
    "functions",
    "name",
    "refusal",
    "audio",
    *MEDIA,
)


def parse_messages(row: Row, where: str) -> ParsedRow:
    """Parse ``messages`` of role and content."""
    turns = turns_of_messages(list_field(row, "messages", where), f"{where}: messages")
    return ParsedRow(turns, images_of(row, where), videos_of(row, where))


def parse_sharegpt(row: Row, where: str) -> ParsedRow:
    """Parse ``conversations`` of from and value, or of role and content, with an optional ``system``."""
    turns = [*system_turns(row, where), *_turns_of_conversation(row, where)]
    return ParsedRow(turns, images_of(row, where), videos_of(row, where))


def parse_llava(row: Row, where: str) -> ParsedRow:
    """Parse ``conversations`` of human and gpt."""
    turns = [_without_marker_lines(turn) for turn in _turns_of_conversation(row, where)]
    return ParsedRow(turns, images_of(row, where), videos_of(row, where))


def turns_of_messages(messages: list, where: str) -> list[Turn]:
    """Return a list of messages of role and content."""
    if not messages:
        raise UserError(f"{where}: no assistant message; add an answer to train on")
    return [_message(message, f"{where}[{index}]") for index, message in enumerate(messages)]


def system_turns(row: Row, where: str) -> list[Turn]:
    """Return the system message of schemas that have a column for it; empty if it is blank."""
    text = optional_text(row, "system", where)
    return [] if text is None else [Turn("system", [{"type": "text", "text": text}], f"{where}: system")]


def has_loss(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a message is trained on, by whichever of `LOSS_KEYS` it has.

    Always True for roles other than assistant.

    Raises UserError for values other than yes or no, keys that contradict each other, and for messages of
    other roles that are marked to be trained on.
    """
    values = {
        key: _flag(message, key, where) for key in message if key in LOSS_KEYS and has_value(message, key)
    }
    if role != "assistant":
        marked = next((key for key in FLAGS if values.get(key)), None)
        if marked is not None:
            got = f"got {message[marked]!r} on a {role} message"
            raise UserError(f"{where}.{marked}: only assistant messages can be trained on, {got}; remove it")
        return True
    if len({*values.values()}) > 1:
        got = " and ".join(f"{key} {message[key]!r}" for key in values)
        raise UserError(f"{where}: keys about its loss contradict each other, got {got}; keep one of them")
    return all(values.values())


def unread_texts(message: Mapping[str, Any], keys: Collection[str], where: str) -> list[str]:
    """Return the keys of texts in a message that no schema reads.

    keys: those that are read. Raises UserError for keys that are part of what was said.
    """
    return _unread(message, (*keys, *LOSS_KEYS), (*UNSUPPORTED, *UNSUPPORTED_LOSS), where)


def unread_block_texts(content: Any, where: str) -> list[str]:
    """Return the keys of texts in a message's typed blocks that no schema reads, each once.

    Raises UserError for keys that are part of what was said; a block has no loss of its own. ``name`` is a
    file's name.
    """
    known = (*CONTENT_KEYS, "type", "name")
    refused = (*UNSUPPORTED, *UNSUPPORTED_LOSS, *LOSS_KEYS)
    keys: dict[str, None] = {}
    for index, block in enumerate(content if isinstance(content, list) else []):
        if isinstance(block, Mapping):
            keys |= dict.fromkeys(_unread(block, known, refused, f"{where}[{index}]"))
    return [*keys]


def _turns_of_conversation(row: Row, where: str) -> list[Turn]:
    messages = list_field(row, "conversations", where)
    place = f"{where}: conversations"
    if not messages or any(
        isinstance(message, Mapping) and has_value(message, "role") for message in messages
    ):
        return turns_of_messages(messages, place)
    return [_spoken(message, f"{place}[{index}]") for index, message in enumerate(messages)]


def _without_marker_lines(turn: Turn) -> Turn:
    if not isinstance(turn.content, str):
        return turn
    return replace(turn, content=MARKER_LINE.sub(MEDIA_TOKEN, turn.content))


def _message(message: Any, where: str) -> Turn:
    _check_keys(message, ("role", "content"), where)
    if message["role"] not in ROLES:
        raise UserError(f"{where}.role: expected one of {', '.join(ROLES)}, got {message['role']!r}")
    return _turn(message, message["role"], ("role", "content"), where)


def _spoken(message: Any, where: str) -> Turn:
    _check_keys(message, ("from", "value"), where)
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise UserError(f"{where}.from: expected human, gpt or system, got {speaker!r}")
    return _turn(message, SPEAKERS[speaker], ("from", "value"), where)


def _turn(message: Mapping[str, Any], role: str, keys: tuple[str, str], where: str) -> Turn:
    content = message[keys[1]]
    place = f"{where}.{keys[1]}"
    if len(message) == len(keys) and isinstance(content, str):  # most messages: no other keys
        return Turn(role, content, place)
    field = where.rpartition(": ")[2].partition("[")[0]
    unread = [f"{field}[].{key}" for key in unread_texts(message, keys, where)]
    unread += [f"{field}[].{keys[1]}[].{key}" for key in unread_block_texts(content, place)]
    return Turn(role, content, place, has_loss(message, role, where), unread)


def _check_keys(message: Any, keys: tuple[str, str], where: str) -> None:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object with {' and '.join(keys)}, got {type_name(message)}")
    missing = next((key for key in keys if key not in message), None)
    if missing is not None:
        raise UserError(f"{where}: expected an object with {' and '.join(keys)}, got no {missing}")


def _unread(
    message: Mapping[str, Any], known: Collection[str], refused: Collection[str], where: str
) -> list[str]:
    unread = {key: value for key, value in message.items() if key not in known and has_content(value)}
    for key, value in unread.items():
        if key in refused:
            raise UserError(f"{where}.{key}: cannot be used, got {type_name(value)}; {_remedy(key)}")
    return [key for key, value in unread.items() if any(texts_in(value))]


def _flag(message: Mapping[str, Any], key: str, where: str) -> bool:
    value = message[key]
    if isinstance(value, bool) and key in FLAGS:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value in (0, 1):
        return bool(value)
    expected = "true (train on it) or false" if key in FLAGS else "1 (train on it) or 0"
    got = repr(value) if isinstance(value, (int, float, str)) else type_name(value)
    raise UserError(f"{where}.{key}: expected {expected}, got {got}; use one of them")


def _remedy(key: str) -> str:
    if key in (*UNSUPPORTED_LOSS, *LOSS_KEYS):
        return "mark whole assistant messages that are not to be trained on with loss: false"
    if key in REASONING:
        return "write it into content, as the chat template has it, or remove it"
    if key in MEDIA:
        return "put it into the row's images or videos, or into a block of content"
    return "write it into content, or remove it"


def _is_llava(row: Row) -> bool:
    """Whether only human and gpt speak, and images, if any, are under LLaVA's name."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or "images" in row or "system" in row:
        return False
    return all(isinstance(turn, Mapping) and turn.get("from") in ("human", "gpt") for turn in turns)


register_schema(
    Schema("messages", fields=("messages",), matches=has_columns("messages"), parse=parse_messages)
)
register_schema(Schema("llava", fields=("conversations",), matches=_is_llava, parse=parse_llava))
register_schema(
    Schema(
        "sharegpt",
        fields=("conversations", "system"),
        matches=has_columns("conversations"),
        parse=parse_sharegpt,
    )
)
