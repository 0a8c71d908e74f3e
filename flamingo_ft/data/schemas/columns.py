"""Which column of a row holds which field of a schema, and which columns nothing reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

from flamingo_ft.data.fields import TAR_MEMBERS, Row, has_content, texts_in, type_name
from flamingo_ft.errors import UserError

# Columns by these names are part of the task that a row states. Exact names, not parts of names: question_id,
# answer_type or caption_source are metadata.
TASK_COLUMNS = frozenset(
    [
        "answer",
        "answers",
        "audio",
        "audios",
        "caption",
        "captions",
        "choice",
        "choices",
        "chosen",
        "class_label",
        "cls",
        "completion",
        "completions",
        "claim",
        "context",
        "contexts",
        "conversation",
        "conversations",
        "dialog",
        "dialogue",
        "explanation",
        "ground_truth",
        "groundtruth",
        "hint",
        "hints",
        "history",
        "hypothesis",
        "input",
        "inputs",
        "instruction",
        "instructions",
        "label",
        "labels",
        "lecture",
        "loss_weight",
        "loss_weights",
        "messages",
        "option",
        "options",
        "output",
        "outputs",
        "passage",
        "premise",
        "prompt",
        "prompts",
        "queries",
        "query",
        "question",
        "questions",
        "rationale",
        "rationales",
        "reasoning",
        "reasoning_content",
        "rejected",
        "rejected_response",
        "response",
        "responses",
        "sample_weight",
        "sentence",
        "solution",
        "solutions",
        "statement",
        "system",
        "system_message",
        "system_prompt",
        "target",
        "targets",
        "thinking",
    ]
)
NUMBERED = re.compile(
    r"(answer|caption|choice|completion|image|img|input|instruction|label|option|output|prompt|question|response"
    r"|target)s?_?([0-9]+|[a-h])"
)
LETTERS = frozenset("abcdefgh")  # the options of a multiple-choice question, where there are an a and a b
# Columns by these names, or with such values, hold the image of a row that has no other.
IMAGE_COLUMNS = re.compile(r"(image|img|photo|picture|pic|video|frame)s?(_?(path|file|url|uri|name|id))?s?")
NUMBER = re.compile(r"[+-]?[0-9][0-9.,eE+-]*")
IMAGE_FILE = re.compile(
    r"\S.*\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|avif|jp2|mp4|webm|mkv|avi|mov)", re.IGNORECASE
)
# They change what a chat template writes or which turns are learned, so a row is no longer itself without them.
UNSUPPORTED = {
    "tools": "write the tools into a system message, or remove the column",
    "functions": "write the functions into a system message, or remove the column",
    "chat_template_kwargs": "set them in the chat template, or remove the column",
    "loss_mask": "mark messages that are not learned with loss: false",
    "loss_scale": "mark messages that are not learned with loss: false",
    "train_on_turn": "mark messages that are not learned with loss: false",
}


@lru_cache(maxsize=4096)
def normalize_name(name: str) -> str:
    """A column's name without case, surrounding white space and byte order mark."""
    return name.strip("\ufeff \t\r\n").casefold()


def find_columns(
    row: Row, columns: Mapping[str, str], fields: Collection[str], where: str, strict: bool = True
) -> dict[str, str]:
    """The column of each field that the row has: the one that ``columns`` names, or the one of its own name.

    Names match whatever their case and surrounding white space. Raises UserError for a column that is not there, and,
    if ``strict``, where several match a field.
    """
    found = {field: _named(row, field, column, where) for field, column in columns.items()}
    by_name: dict[str, list[str]] = {}
    for column in row:
        if normalize_name(column) in fields and normalize_name(column) not in found:
            by_name.setdefault(normalize_name(column), []).append(column)
    for field, matching in by_name.items():
        free = [column for column in matching if column not in found.values()] or matching
        remedy = f"columns: {{{field}: {free[0]}}}"
        found[field] = _one_of(free, f"{where}: {field}", remedy) if strict else free[0]
    return found


def unread_columns(row: Row, read: Collection[str]) -> dict[str, Any]:
    """The columns with something in them that are not among ``read``."""
    return {
        name: value
        for name, value in row.items()
        if name not in read and name != TAR_MEMBERS and has_content(value)
    }


def refuse_unsupported(unread: Mapping[str, Any], where: str) -> None:
    """Refuse a row with a column that no schema can take, and that must not be left out."""
    for column, value in unread.items():
        if normalize_name(column) in UNSUPPORTED:
            raise UserError(
                f"{where}: {column}: cannot be used, got {type_name(value)}; {UNSUPPORTED[normalize_name(column)]}"
            )


def lost_column(unread: Mapping[str, Any], fields: Collection[str], read_values: Any) -> str | None:
    """The first unread column that looks like part of the task: by its name, or as one of ``fields``, which the schema
    could have read. What the fields that are read say too is not lost."""
    suspects = [name for name in unread if normalize_name(name) in fields or _is_of_the_task(name, unread)]
    said = {*_atoms(read_values)} if suspects else set()
    return next((name for name in suspects if not {*_atoms(unread[name])} <= said), None)


def _is_of_the_task(name: str, unread: Collection[str]) -> bool:
    is_option = normalize_name(name) in LETTERS and {"a", "b"} <= {*map(normalize_name, unread)}
    return is_option or _is_named_like_the_task(name)


@lru_cache(maxsize=4096)
def _is_named_like_the_task(name: str) -> bool:
    words = re.sub(r"[\s-]+", "_", normalize_name(name))
    return words in TASK_COLUMNS or NUMBERED.fullmatch(words) is not None


def image_column(unread: Mapping[str, Any]) -> str | None:
    """The unread column that looks most like an image, for rows without any: by its value, else by its name."""
    by_value = (name for name, value in unread.items() if _is_image(value))
    by_name = (
        name for name in unread if IMAGE_COLUMNS.fullmatch(re.sub(r"[\s-]+", "_", normalize_name(name)))
    )
    return next(chain(by_value, by_name), None)


def text_columns(unread: Mapping[str, Any]) -> list[str]:
    """The columns of text, and those of the task whatever they hold. In files of text numbers are text too, and these
    do not count."""
    return [
        name
        for name, value in unread.items()
        if not all(map(NUMBER.fullmatch, texts_in(value))) or _is_of_the_task(name, unread)
    ]


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping) and {*value} == {"bytes", "path"}:
        return True
    return isinstance(value, str) and IMAGE_FILE.fullmatch(value.strip()) is not None


def _named(row: Row, field: str, column: str, where: str) -> str:
    if column in row:
        return column
    matching = [name for name in row if normalize_name(name) == normalize_name(column)]
    if not matching:
        names = ", ".join(name for name in row if name != TAR_MEMBERS)
        raise UserError(f"{where}: columns: {field}: found no column {column!r}, wanted one of {names}")
    return _one_of(matching, f"{where}: columns: {field}", "the exact name")


def _one_of(matching: list[str], where: str, remedy: str) -> str:
    if len(matching) > 1:
        got = " and ".join(map(repr, matching))
        raise UserError(
            f"{where}: several columns have this name, got {got}; rename one, or choose with {remedy}"
        )
    return matching[0]


def _atoms(value: Any) -> Iterator[str]:
    """The texts and numbers in a value, however deeply nested."""
    if isinstance(value, (Mapping, list, tuple)):
        for inside in value.values() if isinstance(value, Mapping) else value:
            yield from _atoms(inside)
    elif isinstance(value, bytes):
        yield f"{len(value)} bytes {hash(value)}"
    elif has_content(value):
        yield str(value).strip()
