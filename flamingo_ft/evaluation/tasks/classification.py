"""Images of your own and their labels, by ranking all labels.

``train.jsonl`` and ``val.jsonl`` have a row in each line, ``{"image": "cats/1.jpg", "label": "cat"}``, with
paths relative to the folder. The labels to rank are those of both files. Training rows are demonstrations
alone, so a label may be any word: a model that learns from demonstrations need not know it.
"""

from __future__ import annotations

from pathlib import Path

from flamingo_ft.errors import UserError

from .folder import DataFolder
from .rows import Row, rows_in_lines
from .task import Example, Task

SOURCE = "recipes/GUIDE.md"
TRAIN, VAL = "train", "val"


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the images of ``train`` or ``val``."""
    rows = {name: _rows(folder, name) for name in (TRAIN, VAL)}
    labels = tuple(sorted({_label(row) for split_rows in rows.values() for row in split_rows}))
    return [_example(row, folder.root, labels) for row in rows[split]]


def _rows(folder: DataFolder, split: str) -> list[Row]:
    file = folder.root / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(
            f'{folder.root}: no file {file.name}; write one, {{"image": PATH, "label": TEXT}} in each line'
        )
    return rows_in_lines(file, SOURCE)


def _label(row: Row) -> str:
    label = row.text("label").strip()
    if not label:
        raise row.error("label: expected text, got an empty one")
    return label


def _example(row: Row, root: Path, labels: tuple[str, ...]) -> Example:
    return Example(row.where, (str(root / row.text("image")),), "", (_label(row),), labels)


TASK = Task(
    name="classification",
    title="Classification of your own images",
    source=SOURCE,
    files=("train.jsonl", "val.jsonl"),
    read=read,
    eval_split=VAL,
    train_split=TRAIN,
    chunk="Output:",
    chat="What is the main object in this image? Answer with its name.",
    metrics=("accuracy",),
    ranks_labels=True,
    separator="",
)
