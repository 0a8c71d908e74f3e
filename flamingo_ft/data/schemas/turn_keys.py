"""Keys of a message beside its role and content: which say that it is not learned, and which cannot be left out.

Toolkits mark an assistant message that is not to be learned in several ways:

    loss: false               ms-swift, this package
    weight: 0                 OpenAI, Mistral, Axolotl's ShareGPT
    train or training: false  Axolotl (`message_field_training`)
    loss_scale: 0             ms-swift
    loss_mask, loss_weight: 0 others
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flamingo_ft.data.fields import given, has_content, kind, texts_in
from flamingo_ft.errors import UserError

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


def is_learned(message: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a message carries loss, by whichever of `LOSS_KEYS` it has; of other roles than the assistant none does.

    Raises UserError for values that are no plain yes or no, keys that contradict each other, and for messages of other
    roles that are to be learned.
    """
    values = {key: _flag(message, key, where) for key in message if key in LOSS_KEYS and given(message, key)}
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
            raise UserError(f"{where}.{key}: cannot be used, got {kind(value)}; {_remedy(key)}")
    return [key for key, value in unread.items() if any(texts_in(value))]


def _flag(message: Mapping[str, Any], key: str, where: str) -> bool:
    value = message[key]
    if isinstance(value, bool) and key in FLAGS:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value in (0, 1):
        return bool(value)
    allowed = "true (learned) or false (not learned)" if key in FLAGS else "1 (learned) or 0 (not learned)"
    got = repr(value) if isinstance(value, (int, float, str)) else kind(value)
    raise UserError(f"{where}.{key}: not {allowed}, got {got}; use one of them")


def _remedy(key: str) -> str:
    if key in (*UNSUPPORTED_LOSS, *LOSS_KEYS):
        return "mark whole assistant messages that are not learned with loss: false"
    if key in IN_CONTENT:
        return "write it into content, as the chat template has it, or remove it"
    if key in ("image", "images", "video", "videos"):
        return "put it into the row's images or videos, or into a block of content"
    return "write it into content, or remove it"
