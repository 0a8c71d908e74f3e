"""A starting recipe for somebody's own data: values that fit what the data is, each with the reason beside it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flamingo_ft.config import DataSection, DataSource, load_recipe
from flamingo_ft.config.data_section import FORMATS
from flamingo_ft.config.keys import MODELINE, schema_text
from flamingo_ft.config.library import SCHEMA_FILE
from flamingo_ft.config.yaml_document import parse
from flamingo_ft.data import OpenedData, open_data
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import one_line

from .inspect_data import ROWS_READ, InspectedData, LengthCounter, inspect_data

NANO = "nano"
BATCH, NANO_BATCH = 8, 16  # samples
HEADROOM = 1.25  # over the longest answer and text read, for rows that were not
ANSWER_STEP, TEXT_STEP = 8, 64  # tokens to round up to
EVALUATED = 200  # samples that are enough to see a difference of some percent
MOST_HELD_OUT = 0.2  # of the rows
FEWEST_STEPS = 200  # before a fresh bridge shows anything
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20
LARGE = 100_000  # samples, of which one pass is enough to begin with


@dataclass(frozen=True)
class RecipeOptions:
    """What the user gave: the data, and where it is not to be found out, more. Paths from the current directory."""

    data: Path
    eval: Path | None = None
    image_root: Path | None = None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    language: str | None = None
    vision: str | None = None
    pretrained: str | None = None
    output_dir: str | None = None


def write_new_recipe(file: Path, wishes: RecipeOptions) -> list[str]:
    """Write a recipe to ``file``, which must not exist, and the schema that editors use beside it.

    Returns what the user should know: problems in the data, estimates. Raises UserError where the data cannot be used.
    """
    if file.exists() or file.is_symlink():
        raise UserError(f"{file}: exists already; choose another name, or remove it first")
    text, notes = new_recipe_text(file, wishes)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "x", encoding="utf-8") as new:
        new.write(text)
    schema = file.with_name(SCHEMA_FILE)
    if not schema.exists():
        schema.write_text(schema_text(), encoding="utf-8")
    try:
        load_recipe(file)
    except UserError:
        file.unlink()
        raise
    return notes


def new_recipe_text(file: Path, wishes: RecipeOptions) -> tuple[str, list[str]]:
    """The recipe, and notes about it."""
    language = wishes.language or NANO
    vision, pretrained = _tower(wishes)
    measure = LengthCounter(_folder_or_name(language))
    train = inspect_data(_entry(wishes.data, wishes), measure)
    held_out = None if wishes.eval is None else inspect_data(_entry(wishes.eval, wishes), measure)
    values = {
        "file": file.name,
        "command": shlex.quote(os.path.relpath(file)),
        "modeline": MODELINE,
        "language": _backbone_in(file, language),
        "vision": _backbone_in(file, vision),
        "pretrained": pretrained,
        "nano": language == NANO,
        "train": train,
        "sources": {"train": _source(file, train), "eval": held_out and _source(file, held_out)},
        "rows_read": ROWS_READ,
        "output_dir": wishes.output_dir or f"runs/{file.stem}",
        **_lengths([train, *([held_out] if held_out else [])]),
        **_schedule(train, held_out, NANO_BATCH if language == NANO else BATCH),
    }
    return _render(values), _notes(train, held_out)


def _tower(wishes: RecipeOptions) -> tuple[str, str | None]:
    """The vision tower and its tag: small beside the nano language model, OpenAI's ViT-L-14 beside a real one."""
    if wishes.vision is None:
        return (
            (NANO, None) if wishes.language in (None, NANO) else ("ViT-L-14", wishes.pretrained or "openai")
        )
    whole = (
        wishes.vision == NANO
        or wishes.vision.startswith("hf-hub:")
        or Path(wishes.vision).expanduser().is_dir()
    )
    if not whole and wishes.pretrained is None:
        raise UserError(
            f"--vision {wishes.vision}: an architecture has no weights of its own; add --pretrained TAG, such as openai"
        )
    return wishes.vision, wishes.pretrained


def _entry(path: Path, wishes: RecipeOptions) -> DataSource:
    root = None if wishes.image_root is None else wishes.image_root.expanduser().absolute()
    if wishes.format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"--format {wishes.format}: no schema of this name; use one of {known}")
    path = path.expanduser().absolute()
    return DataSource(path=path, image_root=root, format=wishes.format, columns=dict(wishes.columns))


def _lengths(inspected: list[InspectedData]) -> dict[str, Any]:
    """How long answers may be, and texts; the latter only where they were counted."""
    lengths = [one.lengths for one in inspected]
    answer, text = max(one.answer_tokens for one in lengths), max(one.text_tokens for one in lengths)
    over, context = sum(one.over_context for one in lengths), lengths[0].context
    limit = _rounded(text * HEADROOM, TEXT_STEP)
    return {
        "counted": lengths[0].counted,
        "answer_tokens": answer,
        "max_new_tokens": _rounded(answer * HEADROOM, ANSWER_STEP),
        "text_tokens": text,
        "max_text_tokens": min(limit, context or limit) if lengths[0].counted else None,
        "context": context,
        "over_context": over,
    }


def _schedule(train: InspectedData, held_out: InspectedData | None, most_in_batch: int) -> dict[str, Any]:
    """What is held out, and how long and in what batches to train."""
    fraction, data = _split(train, holds_out=held_out is None)
    samples = sum(mixed.size for mixed in data.train)
    evaluated = held_out.rows if held_out else sum(mixed.size for mixed in data.eval)
    batch = min(most_in_batch, samples)
    epochs = (
        1
        if samples >= LARGE
        else min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(FEWEST_STEPS * batch / samples)))
    )
    return {
        "eval_fraction": fraction,
        "held_out": evaluated,
        "max_samples": None if evaluated <= 2 * EVALUATED else 2 * EVALUATED,
        "samples": samples,
        "batch_size": batch,
        "epochs": epochs,
        "steps": math.ceil(epochs * samples / batch),
    }


def _split(train: InspectedData, holds_out: bool) -> tuple[float | None, OpenedData]:
    """The fraction to hold out, and the data split by it: enough rows to measure on, at most a fifth.

    None where evaluation data was given, and where nothing can be held out because all rows share their images.
    """
    section = DataSection(train=(train.entry,), allow_urls=train.urls)
    fraction = max(0.01, round(min(MOST_HELD_OUT, EVALUATED / train.rows), 2))
    if holds_out:
        try:
            return fraction, open_data(section.model_copy(update={"eval_fraction": fraction}), seed=0)
        except UserError:
            pass  # as hold_out says; the recipe says so too
    return None, open_data(section, seed=0)


def _rounded(number: float, step: int) -> int:
    return step * math.ceil(number / step)


def _notes(*inspected: InspectedData | None) -> list[str]:
    notes = []
    for one in filter(None, inspected):
        if one.problems:
            rows = f"{len(one.problems):,} of {one.read:,} rows cannot be used"
            notes.append(
                f"{one.entry.path}: {rows}, the first: {one.problems[0]}; flamingo-ft check lists all"
            )
        if one.unread:
            remedy = "if one is part of the task, write it into a column that is read, or name its field with --column"
            notes.append(
                f"{one.entry.path}: columns of text that are left out: {', '.join(one.unread)}; {remedy}"
            )
        if not one.pictured:
            remedy = "if a column holds them, add --column image=COLUMN"
            notes.append(f"{one.entry.path}: the rows read have no images; {remedy}")
    if not inspected[0].lengths.counted:
        notes.append(
            "lengths are estimated from characters, as the language model's tokenizer is not on this machine; "
            "flamingo-ft check counts them"
        )
    return notes


# --- text ---


def _source(file: Path, inspected: InspectedData) -> str:
    """An entry of data.train or data.eval, in YAML's flow style."""
    entry = inspected.entry
    fields = {"path": _path_in(file, entry.path), "format": entry.format}
    if entry.columns:
        fields["columns"] = dict(entry.columns)
    if entry.image_root is not None:
        fields["image_root"] = _path_in(file, entry.image_root)
    return _yaml(fields)


def _path_in(file: Path, path: Path) -> str:
    """A path as the recipe has it: relative to its folder where that is near, absolute elsewhere."""
    relative = os.path.relpath(path.absolute(), file.absolute().parent)
    return (
        str(path.absolute())
        if relative.startswith(os.path.join("..", "..", ".."))
        else Path(relative).as_posix()
    )


def _folder_or_name(backbone: str) -> str:
    folder = Path(backbone).expanduser()
    return str(folder.absolute()) if folder.is_dir() else backbone


def _backbone_in(file: Path, backbone: str) -> str:
    """A backbone's name as the recipe has it; a folder that is given from the current directory by an explicit path."""
    if not Path(backbone).expanduser().is_dir():
        return backbone
    path = _path_in(file, Path(backbone).expanduser())
    return path if path.startswith(("/", "../")) else f"./{path}"


def _yaml(value: Any) -> str:
    """A value in YAML's flow style, in which recipes read it back."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(name)}: {_yaml(one)}" for name, one in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"[A-Za-z./][\w./-]*", value, re.ASCII)
    if plain and parse(f"- {value}", "value").values == [value]:
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


def _render(values: Mapping[str, Any]) -> str:
    loader = PackageLoader("flamingo_ft.check", "")
    environment = Environment(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"yaml": _yaml, "line": one_line, "n": "{:,}".format}
    return environment.get_template("new_recipe.yaml.jinja").render(values)
