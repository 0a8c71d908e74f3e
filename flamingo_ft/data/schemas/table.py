"""Every schema by its name in recipes, what it wants, and how it is recognised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ft.data.fields import TAR_MEMBERS, Row, type_name
from flamingo_ft.errors import UserError

from . import dialogues, documents, preference, questions
from .mimicit import IMAGES_FILE
from .schema import MEDIA_FIELDS, ParsedRow

MIMICIT = "mimicit"
COMMON = (*MEDIA_FIELDS, "task")


@dataclass(frozen=True)
class Schema:
    """fields: what it reads beside images and task. wants: the columns that it is recognised by, in words.

    read is None for MIMIC-IT, whose rows need other rows and another file.
    """

    fields: tuple[str, ...]
    wants: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, str], ParsedRow] | None
    picks: Callable[[Row], str | None] | None = None
    """The one of the fields that a row is read from, where they are alternatives."""

    def reads(self, row: Row) -> tuple[str, ...]:
        """The fields that reading the row uses."""
        picked = self.picks(row) if self.picks else None
        return self.fields if picked is None else (picked,)


def detect_schema(row: Any, where: str) -> str:
    """The name of the schema that a row's columns fit. UserError listing what was found and what would do."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: found {type_name(row)}, wanted an object")
    name = next((name for name, schema in SCHEMAS.items() if schema.fits(row)), None)
    if name is None:
        found = ", ".join(column for column in row if column != TAR_MEMBERS) or "none"
        known = "; ".join(f"{name} ({schema.wants})" for name, schema in SCHEMAS.items())
        raise UserError(
            f"{where}: found the columns {found}, wanted those of {known}; name them with columns and format"
        )
    return name


def check_columns(columns: Mapping[str, str], name: str, where: str) -> None:
    """Refuse a mapping of fields that the schema does not have."""
    known = {*SCHEMAS[name].fields, *(COMMON if name != MIMICIT else ("task",))}
    unknown = [field for field in columns if field not in known]
    if unknown:
        raise UserError(
            f"{where}: columns: found {unknown[0]!r}, wanted fields of {name}: {', '.join(sorted(known))}"
        )


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


def _is_llava(row: Row) -> bool:
    """human and gpt alone, and images under LLaVA's name if anywhere."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or "images" in row or "system" in row:
        return False
    return all(isinstance(turn, Mapping) and turn.get("from") in ("human", "gpt") for turn in turns)


def _is_vqa(row: Row) -> bool:
    return "question" in row and ("answer" in row or "answers" in row)


def _is_caption(row: Row) -> bool:
    media = any(name in row for name in MEDIA_FIELDS)
    return media and any(name in row for name in documents.CAPTION_FIELDS)


def _is_interleaved(row: Row) -> bool:
    return "text_list" in row or isinstance(row.get("texts"), list)


# In this order: the first that fits. A preference pair has a prompt too, an instruction of MIMIC-IT an answer.
SCHEMAS = {
    "preference": Schema(
        ("prompt", "chosen", "rejected", "system"),
        "prompt, chosen, rejected",
        _has("chosen", "rejected"),
        preference.read_preference,
    ),
    "messages": Schema(("messages",), "messages and images", _has("messages"), dialogues.read_messages),
    "llava": Schema(
        ("conversations",), "conversations of human and gpt, image", _is_llava, dialogues.read_llava
    ),
    "sharegpt": Schema(
        ("conversations", "system"),
        "conversations of from and value or role and content, images",
        _has("conversations"),
        dialogues.read_sharegpt,
    ),
    MIMICIT: Schema(
        ("instruction", "answer", "image_ids", "rel_ins_ids", "id", IMAGES_FILE),
        "instruction, answer, image_ids",
        _has("instruction", "answer", "image_ids"),
        None,
    ),
    "alpaca": Schema(
        ("instruction", "input", "output", "system"),
        "instruction, output, image",
        _has("instruction", "output"),
        questions.read_alpaca,
    ),
    "prompt_completion": Schema(
        ("prompt", "completion"),
        "prompt, completion, images",
        _has("prompt", "completion"),
        questions.read_prompt_completion,
    ),
    "interleaved": Schema(
        ("text_list", "image_info", "texts"),
        "text_list and image_info, or texts and images",
        _is_interleaved,
        documents.read_interleaved,
    ),
    "vqa": Schema(
        ("question", "answer", "answers", "system"),
        "question, answer or answers, image",
        _is_vqa,
        questions.read_vqa,
    ),
    "caption": Schema(
        documents.CAPTION_FIELDS,
        "image, caption or text",
        _is_caption,
        documents.read_caption,
        documents.caption_field,
    ),
}
