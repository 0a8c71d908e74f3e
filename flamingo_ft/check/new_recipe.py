"""Write a starting recipe for a user's data: values that fit what the data holds, each with its reason."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flamingo_ft.config import DataSection, DataSource, load_recipe
from flamingo_ft.config.data_section import FORMATS
from flamingo_ft.config.keys import MODELINE, schema_text
from flamingo_ft.config.library import SCHEMA_FILE
from flamingo_ft.config.yaml_document import parse
from flamingo_ft.data import OpenedData, open_data
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import one_line
from flamingo_ft.hub.names import ON_HUB, TIMM
from flamingo_ft.templates import load_template

from .inspect_data import MAX_ROWS_READ, InspectedData, LengthCounter, inspect_data

NANO = "nano"
BATCH_SIZE, NANO_BATCH_SIZE = 8, 16
HEADROOM = 1.25  # over the longest answer and text read, for rows that were not read
ANSWER_STEP, TEXT_STEP = 8, 64  # tokens to round up to
NOTHING_HELD_OUT = (
    "there are no held-out samples, because all rows share their images or there is only one; add some with "
    "--eval to measure accuracy"
)
CONTINUES_IMAGES = (
    "rows of image and caption: the model learns to continue an image, so ask it without --prompt; for "
    "questions, write a table with the columns image, question and answer"
)
REFINING = ("preference", "unpaired_preference")  # formats whose methods refine a trained model
REFINES = (
    "rows of preferences refine a model that answers already: fill in model.init_from, the folder of one "
    "that was trained on questions with one answer"
)
EVAL_SAMPLES = 200  # enough to see a difference of a few percent
MAX_EVAL_FRACTION = 0.2  # of the rows
MIN_STEPS = 200  # before a new bridge shows anything
MIN_EPOCHS, MAX_EPOCHS = 3, 20
LARGE = 100_000  # samples, of which one epoch is enough to begin with


@dataclass(frozen=True)
class RecipeOptions:
    """The options of `recipes new`. Paths are relative to the current directory."""

    data: Path
    eval: Path | None = None
    image_root: Path | None = None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    language: str | None = None
    vision: str | None = None
    pretrained: str | None = None
    output_dir: str | None = None


def write_new_recipe(file: Path, options: RecipeOptions) -> list[str]:
    """Write a recipe to ``file``, which must not exist, and beside it the JSON schema for editors.

    Returns notes for the user: problems in the data, estimates. Raises UserError if the data cannot be used.
    """
    if file.exists() or file.is_symlink():
        raise UserError(f"{file}: exists already; choose another name, or remove it first")
    text, notes = new_recipe_text(file, options)
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


def new_recipe_text(file: Path, options: RecipeOptions) -> tuple[str, list[str]]:
    """Return the text of the recipe, and notes for the user."""
    language = options.language or NANO
    vision, pretrained = _tower(options)
    counter = LengthCounter(_folder_or_name(language))
    train = inspect_data(_entry(options.data, options), counter)
    evaluation = None if options.eval is None else inspect_data(_entry(options.eval, options), counter)
    inspected = [train] if evaluation is None else [train, evaluation]
    values = {
        "file": file.name,
        "command": shlex.quote(os.path.relpath(file)),
        "modeline": MODELINE,
        "language": _backbone_in(file, language),
        "vision": _backbone_in(file, vision),
        "pretrained": pretrained,
        "nano": language == NANO,
        "refines": train.entry.format in REFINING,
        "train": train,
        "sources": {"train": _source(file, train), "eval": evaluation and _source(file, evaluation)},
        "rows_read": MAX_ROWS_READ,
        "output_dir": options.output_dir or f"runs/{file.stem}",
        **_lengths(inspected),
        **_schedule(train, evaluation, NANO_BATCH_SIZE if language == NANO else BATCH_SIZE),
    }
    notes = _notes(inspected)
    if evaluation is None and values["eval_fraction"] is None:
        notes.append(NOTHING_HELD_OUT)
    return _render(values), notes


def _tower(options: RecipeOptions) -> tuple[str, str | None]:
    """Return the vision tower and its tag: nano beside the nano language model, else OpenAI's ViT-L-14."""
    if options.vision is None:
        if options.language in (None, NANO):
            return NANO, None
        return "ViT-L-14", options.pretrained or "openai"
    has_weights = (
        options.vision == NANO
        or options.vision.startswith((ON_HUB, TIMM))
        or Path(options.vision).expanduser().is_dir()
    )
    if not has_weights and options.pretrained is None:
        raise UserError(
            f"--vision {options.vision}: an architecture has no weights of its own; "
            "add --pretrained TAG, such as openai"
        )
    return options.vision, options.pretrained


def _entry(path: Path, options: RecipeOptions) -> DataSource:
    root = None if options.image_root is None else options.image_root.expanduser().absolute()
    if options.format not in FORMATS:
        raise UserError(f"--format {options.format}: no such format; use one of {', '.join(FORMATS)}")
    path = path.expanduser().absolute()
    return DataSource(path=path, image_root=root, format=options.format, columns=dict(options.columns))


def _lengths(inspected: Sequence[InspectedData]) -> dict[str, Any]:
    """Return limits for answers, and for texts if their tokens were counted."""
    lengths = [data.lengths for data in inspected]
    counted, context = lengths[0].counted, lengths[0].context
    answer = max(one.answer_tokens for one in lengths)
    text = max(one.text_tokens for one in lengths)
    limit = _round_up(text * HEADROOM, TEXT_STEP)
    return {
        "counted": counted,
        "answer_tokens": answer,
        "max_new_tokens": _round_up(answer * HEADROOM, ANSWER_STEP),
        "text_tokens": text,
        "max_text_tokens": min(limit, context or limit) if counted else None,
        "context": context,
        "over_context": sum(one.over_context for one in lengths),
    }


def _schedule(train: InspectedData, evaluation: InspectedData | None, max_batch_size: int) -> dict[str, Any]:
    """Return the evaluation split, the batch size and the length of the run."""
    fraction, data = _split(train, hold_out=evaluation is None)
    samples = sum(source.size for source in data.train)
    eval_samples = evaluation.rows if evaluation else sum(source.size for source in data.eval)
    batch_size = min(max_batch_size, samples)
    if samples >= LARGE:
        epochs = 1
    else:
        epochs = min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(MIN_STEPS * batch_size / samples)))
    return {
        "eval_fraction": fraction,
        "eval_samples": eval_samples,
        "max_samples": None if eval_samples <= 2 * EVAL_SAMPLES else 2 * EVAL_SAMPLES,
        "samples": samples,
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": math.ceil(epochs * samples / batch_size),
    }


def _split(train: InspectedData, hold_out: bool) -> tuple[float | None, OpenedData]:
    """Return the fraction to hold out (enough rows to measure on, at most a fifth), and the data split by it.

    The fraction is None without ``hold_out``, or if all rows share their images.
    """
    section = DataSection(train=(train.entry,), allow_urls=train.urls)
    fraction = max(0.01, round(min(MAX_EVAL_FRACTION, EVAL_SAMPLES / train.rows), 2))
    if hold_out:
        try:
            return fraction, open_data(section.model_copy(update={"eval_fraction": fraction}), seed=0)
        except UserError:
            pass  # all rows share their images, or there is one row: the template says so in the recipe
    return None, open_data(section, seed=0)


def _round_up(number: float, step: int) -> int:
    return step * math.ceil(number / step)


def _notes(inspected: Sequence[InspectedData]) -> list[str]:
    notes = []
    if inspected[0].entry.format == "caption":
        notes.append(CONTINUES_IMAGES)
    if inspected[0].entry.format in REFINING:
        notes.append(REFINES)
    for data in inspected:
        path = data.entry.path
        if data.problems:
            notes.append(
                f"{path}: {len(data.problems):,} of {data.read:,} rows cannot be used, "
                f"the first: {data.first_problem}; flamingo-ft check lists all"
            )
        if data.unread:
            kind = next(iter(data.unread)) if len(data.unread) == 1 else "COLUMN"
            notes.append(
                f"{path}: columns of text that are left out: {', '.join(data.unread)}; if one is part of the "
                "question or answer, write it into a column that is read; if it names the kind of question, "
                f"results are shown by it with --column {shlex.quote(f'task={kind}')}"
            )
        if not data.pictured:
            notes.append(
                f"{path}: the rows read have no images; if a column holds them, add --column image=COLUMN"
            )
    if not inspected[0].lengths.counted:
        notes.append(
            "lengths are estimated from characters, as the language model's tokenizer is not on this "
            "machine; flamingo-ft check counts them"
        )
    return notes


# --- text ---


def _source(file: Path, inspected: InspectedData) -> str:
    """Return an entry of data.train or data.eval in YAML's flow style."""
    entry = inspected.entry
    assert entry.path is not None
    fields: dict[str, Any] = {"path": _path_in(file, entry.path), "format": entry.format}
    if entry.columns:
        fields["columns"] = dict(entry.columns)
    if entry.box_unit != "pixels":
        fields["box_unit"] = entry.box_unit
    if entry.image_root is not None:
        fields["image_root"] = _path_in(file, entry.image_root)
    return _yaml(fields)


def _path_in(file: Path, path: Path) -> str:
    """Return a path as the recipe has it: relative to the recipe if near, else absolute."""
    relative = os.path.relpath(path.absolute(), file.absolute().parent)
    if relative.startswith(os.path.join("..", "..", "..")):
        return str(path.absolute())
    return Path(relative).as_posix()


def _folder_or_name(backbone: str) -> str:
    folder = Path(backbone).expanduser()
    return str(folder.absolute()) if folder.is_dir() else backbone


def _backbone_in(file: Path, backbone: str) -> str:
    """Return a backbone as the recipe names it; a folder as an explicit path (./NAME, ../NAME, absolute)."""
    if not Path(backbone).expanduser().is_dir():
        return backbone
    path = _path_in(file, Path(backbone).expanduser())
    return path if path.startswith(("/", "../")) else f"./{path}"


def _yaml(value: Any) -> str:
    """Write a value in YAML's flow style, such that the recipe's parser reads it back."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(name)}: {_yaml(one)}" for name, one in value.items()) + "}"
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"[A-Za-z./][\w./-]*", value, re.ASCII)
    if plain and parse(f"- {value}", "value").values == [value]:
        return value
    return json.dumps(value, ensure_ascii=not value.isprintable())


def _render(values: Mapping[str, Any]) -> str:
    template = load_template(
        "check/new_recipe.yaml.jinja",
        filters={"yaml": _yaml, "line": one_line, "n": "{:,}".format},
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return template.render(values)
