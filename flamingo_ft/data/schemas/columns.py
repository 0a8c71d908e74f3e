"""Which column of a row holds which field of a schema, and which columns no schema reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

from flamingo_ft.data.fields import TAR_MEMBERS, Row, has_content, texts_in, type_name
from flamingo_ft.errors import UserError

# Columns with exactly these names are part of the task; question_id or caption_source, say, are metadata.
TASK_COLUMNS = frozenset(
    """
    answer answers audio audios caption captions choice choices chosen class_label cls completion
    completions claim context contexts conversation conversations dialog dialogue explanation ground_truth
    groundtruth hint hints history hypothesis input inputs instruction instructions label labels lecture
    loss_weight loss_weights messages option options output outputs passage premise prompt prompts queries
    query question questions rationale rationales reasoning reasoning_content rejected rejected_response
    response responses sample_weight sentence solution solutions statement system system_message
    system_prompt target targets thinking
    """.split()  # noqa: SIM905 (a list would take a line per name)
)
NUMBERED = re.compile(
    r"(answer|caption|choice|completion|image|img|input|instruction|label|option|output|prompt|question|response"
    r"|target)s?_?([0-9]+|[a-h])"
)
LETTERS = frozenset("abcdefgh")  # options of a multiple-choice question, in rows with columns a and b
# Names of columns that may hold the image of a row in which no image was read.
IMAGE_COLUMNS = re.compile(r"(image|img|photo|picture|pic|video|frame)s?(_?(path|file|url|uri|name|id))?s?")
# Names of columns that may hold the better and the worse answer of a preference pair.
CHOSEN_COLUMNS = re.compile(
    r"(chosen|better|best|preferred|accepted|good|win(ner|ning)?|positive)(_(answer|response|output|text))?"
)
REJECTED_COLUMNS = re.compile(
    r"(rejected|worse|worst|dispreferred|bad|los(er|ing|e)|negative)(_(answer|response|output|text))?"
)
NUMBER = re.compile(r"[+-]?[0-9][0-9.,eE+-]*")
IMAGE_FILE = re.compile(
    r"\S.*\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|avif|jp2|mp4|webm|mkv|avi|mov)", re.IGNORECASE
)
# These change what a chat template writes or which turns are trained on, so they cannot be left out.
UNSUPPORTED = {
    "tools": "write the tools into a system message, or remove the column",
    "functions": "write the functions into a system message, or remove the column",
    "chat_template_kwargs": "set them in the chat template, or remove the column",
    "loss_mask": "mark messages that are not to be trained on with loss: false",
    "loss_scale": "mark messages that are not to be trained on with loss: false",
    "train_on_turn": "mark messages that are not to be trained on with loss: false",
}


@lru_cache(maxsize=4096)
def normalize_name(name: str) -> str:
    """Return a column's name in lower case, without surrounding whitespace and byte order mark."""
    return name.strip("\ufeff \t\r\n").casefold()


def find_columns(
    row: Row, columns: Mapping[str, str], fields: Collection[str], where: str, strict: bool = True
) -> dict[str, str]:
    """Return the column of each field that the row has: the one in ``columns``, else the one of its name.

    Names are compared without case and surrounding whitespace. Raises UserError for a column that does not
    exist, and with ``strict`` if several columns match a field.
    """
    found = {field: _named_column(row, field, column, where) for field, column in columns.items()}
    by_name: dict[str, list[str]] = {}
    for column in row:
        if normalize_name(column) in fields and normalize_name(column) not in found:
            by_name.setdefault(normalize_name(column), []).append(column)
    for field, matching in by_name.items():
        free = [column for column in matching if column not in found.values()] or matching
        remedy = f"columns: {{{field}: {free[0]}}}"
        found[field] = _only(free, f"{where}: {field}", remedy) if strict else free[0]
    return found


def guess_columns(row: Row) -> dict[str, str]:
    """Return which columns of a row could hold its image and caption, or image, question and answers.

    Nothing for a row without a column of image files and one of text.
    """
    values = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
    image = next((name for name, value in values.items() if IMAGE_FILE.fullmatch(value.strip())), None)
    texts = [name for name in values if name != image]
    if image is None or not texts:
        return {}
    if len(texts) == 1:
        return {"image": image, "caption": texts[0]}
    pair = _answer_pair(texts)
    texts = [name for name in texts if name not in pair.values()] or texts
    question = next((name for name in texts if values[name].rstrip().endswith("?")), texts[0])
    if pair:
        return {"image": image, "prompt": question, **pair}
    answer = next(name for name in texts if name != question)
    return {"image": image, "question": question, "answer": answer}


def _answer_pair(names: Collection[str]) -> dict[str, str]:
    """Return the columns of a better and a worse answer by field; none without both and a question."""
    fields = {"chosen": CHOSEN_COLUMNS, "rejected": REJECTED_COLUMNS}
    found = {
        field: next((name for name in names if pattern.fullmatch(_with_underscores(name))), None)
        for field, pattern in fields.items()
    }
    is_pair = all(found.values()) and len(names) > len(found)
    return {field: name for field, name in found.items() if name is not None} if is_pair else {}


def unread_columns(row: Row, read: Collection[str]) -> dict[str, Any]:
    """Return the columns that are not empty and not among ``read``."""
    return {
        name: value
        for name, value in row.items()
        if name not in read and name != TAR_MEMBERS and has_content(value)
    }


def refuse_unsupported(unread: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a column that no schema can read and that must not be left out."""
    for column, value in unread.items():
        if normalize_name(column) in UNSUPPORTED:
            remedy = UNSUPPORTED[normalize_name(column)]
            raise UserError(f"{where}: {column}: cannot be used, got {type_name(value)}; {remedy}")


def task_column(unread: Mapping[str, Any], fields: Collection[str], read_values: Any) -> str | None:
    """Return the first unread column that looks like part of the task, by its name or as one of ``fields``.

    Columns that only repeat values that are read do not count.
    """
    candidates = [name for name in unread if normalize_name(name) in fields or _is_task_name(name, unread)]
    known = {*_leaves(read_values)} if candidates else set()
    return next((name for name in candidates if not {*_leaves(unread[name])} <= known), None)


def image_column(unread: Mapping[str, Any]) -> str | None:
    """Return the unread column that looks most like an image: by its value, else by its name."""
    by_value = (name for name, value in unread.items() if _is_image(value))
    by_name = (name for name in unread if IMAGE_COLUMNS.fullmatch(_with_underscores(name)))
    return next(chain(by_value, by_name), None)


def text_columns(unread: Mapping[str, Any]) -> list[str]:
    """Return the columns of text, and columns of the task whatever they hold.

    Numbers as text, as in CSV files, do not count as text.
    """
    return [
        name
        for name, value in unread.items()
        if not all(map(NUMBER.fullmatch, texts_in(value))) or _is_task_name(name, unread)
    ]


def _is_task_name(name: str, unread: Collection[str]) -> bool:
    is_option = normalize_name(name) in LETTERS and {"a", "b"} <= {*map(normalize_name, unread)}
    return is_option or _is_known_task_name(name)


@lru_cache(maxsize=4096)
def _is_known_task_name(name: str) -> bool:
    name = _with_underscores(name)
    return name in TASK_COLUMNS or NUMBERED.fullmatch(name) is not None


def _with_underscores(name: str) -> str:
    return re.sub(r"[\s-]+", "_", normalize_name(name))


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping) and {*value} == {"bytes", "path"}:
        return True
    return isinstance(value, str) and IMAGE_FILE.fullmatch(value.strip()) is not None


def _named_column(row: Row, field: str, column: str, where: str) -> str:
    """Return the column that the recipe's ``columns`` names for a field."""
    if column in row:
        return column
    matching = [name for name in row if normalize_name(name) == normalize_name(column)]
    if not matching:
        names = ", ".join(name for name in row if name != TAR_MEMBERS)
        raise UserError(f"{where}: columns: {field}: no such column, got {column!r}; use one of {names}")
    return _only(matching, f"{where}: columns: {field}", "the exact name")


def _only(matching: list[str], where: str, remedy: str) -> str:
    if len(matching) > 1:
        got = " and ".join(map(repr, matching))
        raise UserError(
            f"{where}: several columns have this name, got {got}; rename one, or choose with {remedy}"
        )
    return matching[0]


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value, however deeply nested."""
    if isinstance(value, (Mapping, list, tuple)):
        for inside in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(inside)
    elif isinstance(value, bytes):
        yield f"{len(value)} bytes {hash(value)}"
    elif has_content(value):
        yield str(value).strip()
