"""Dialogues: `messages` as OpenAI and TRL write them, LLaVA's and ShareGPT's `conversations`.

Keys of a message beside its role and content: which say that it is not learned, and which cannot be left out.

Toolkits mark an assistant message that is not to be learned in several ways:

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
from .schema import ParsedRow, Turn, images_of, videos_of

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# LLaVA writes its marker on a line of its own, before or after the question; the line break belongs to the marker.
MARKER_LINE = re.compile(rf"{re.escape(MEDIA_TOKEN)}\n|\n{re.escape(MEDIA_TOKEN)}$")


def read_messages(row: Row, where: str) -> ParsedRow:
    turns = messages_of(list_field(row, "messages", where), f"{where}: messages")
    return ParsedRow(turns, images_of(row, where), videos_of(row, where))


def read_sharegpt(row: Row, where: str) -> ParsedRow:
    """`conversations` of from and value, or of role and content, with an optional ``system``."""
    turns = conversation_of(row, where)
    return ParsedRow([*system_of(row, where), *turns], images_of(row, where), videos_of(row, where))


def read_llava(row: Row, where: str) -> ParsedRow:
    """`conversations` of human and gpt."""
    turns = [
        replace(turn, content=MARKER_LINE.sub(MEDIA_TOKEN, turn.content))
        if isinstance(turn.content, str)
        else turn
        for turn in conversation_of(row, where)
    ]
    return ParsedRow(turns, images_of(row, where), videos_of(row, where))


def conversation_of(row: Row, where: str) -> list[Turn]:
    turns = list_field(row, "conversations", where)
    place = f"{where}: conversations"
    if not turns or any(isinstance(turn, Mapping) and has_value(turn, "role") for turn in turns):
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
    return Turn(role, message[content], place, has_loss(message, role, where), unread)


def _check_keys(turn: Any, keys: tuple[str, str], where: str) -> None:
    wanted = f"wanted an object with {' and '.join(keys)}"
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: found {type_name(turn)}, {wanted}")
    lacking = [key for key in keys if key not in turn]
    if lacking:
        raise UserError(f"{where}: found no {lacking[0]}, {wanted}")


FLAGS = ("loss", "train", "training", "loss_mask")  # true or false, or 1 or 0
WEIGHTS = ("weight", "loss_weight", "loss_scale")  # 1 or 0
LOSS_KEYS = (*FLAGS, *WEIGHTS)
# They say that parts of a message are learned, or the opposite of the others.
UNSUPPORTED_LOSS = ("train_detail", "training_detail", "mask", "masked")
# Part of what was said, which samples have no place for.
UNSUPPORTED = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thought",
    "thoughts",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "tools",
    "functions",
    "name",
    "refusal",
    "audio",
    "image",
    "images",
    "video",
    "videos",
)
IN_CONTENT = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")


def has_loss(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a message carries loss, by whichever of `LOSS_KEYS` it has; of other roles than the assistant none does.

    Raises UserError for values that are no plain yes or no, keys that contradict each other, and for messages of other
    roles that are to be learned.
    """
    values = {
        key: _flag(message, key, where) for key in message if key in LOSS_KEYS and has_value(message, key)
    }
    if role != "assistant":
        asked = next((key for key in FLAGS if values.get(key)), None)
        if asked is not None:
            got = f"got {message[asked]!r} on a {role} message"
            raise UserError(f"{where}.{asked}: only assistant messages can be learned, {got}; remove it")
        return True
    if len({*values.values()}) > 1:
        got = " and ".join(f"{key} {message[key]!r}" for key in values)
        raise UserError(f"{where}: keys about its loss contradict each other, got {got}; keep one of them")
    return all(values.values())


def unread_texts(message: Mapping[str, Any], keys: Collection[str], where: str) -> list[str]:
    """The keys of texts in a message that nothing reads. UserError for those that are part of what was said."""
    return _unread(message, (*keys, *LOSS_KEYS), (*UNSUPPORTED, *UNSUPPORTED_LOSS), where)


def unread_block_texts(block: Mapping[str, Any], keys: Collection[str], where: str) -> list[str]:
    """The same of a typed block, of which the loss cannot be chosen, and whose name is that of a file."""
    return _unread(block, (*keys, "name"), (*UNSUPPORTED, *UNSUPPORTED_LOSS, *LOSS_KEYS), where)


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
    allowed = "true (learned) or false (not learned)" if key in FLAGS else "1 (learned) or 0 (not learned)"
    got = repr(value) if isinstance(value, (int, float, str)) else type_name(value)
    raise UserError(f"{where}.{key}: not {allowed}, got {got}; use one of them")


def _remedy(key: str) -> str:
    if key in (*UNSUPPORTED_LOSS, *LOSS_KEYS):
        return "mark whole assistant messages that are not learned with loss: false"
    if key in IN_CONTENT:
        return "write it into content, as the chat template has it, or remove it"
    if key in ("image", "images", "video", "videos"):
        return "put it into the row's images or videos, or into a block of content"
    return "write it into content, or remove it"


def unread_block_keys(content: Any, where: str) -> list[str]:
    """The keys of texts in typed blocks that nothing reads. UserError for those that are part of what was said."""
    blocks = content if isinstance(content, list) else []
    unread: dict[str, None] = {}
    for index, block in enumerate(blocks):
        if isinstance(block, Mapping):
            known = (*CONTENT_KEYS, "type")
            unread |= dict.fromkeys(unread_block_texts(block, known, f"{where}[{index}]"))
    return [*unread]
