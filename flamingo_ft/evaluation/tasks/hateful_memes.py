"""Hateful Memes: the seen development set, scored by the area under the ROC curve of yes and no.

A file has a row in each line, ``{"id", "img": "img/42953.png", "label": 0 or 1, "text"}``. The first release
calls the set ``dev.jsonl``. Source: https://arxiv.org/abs/2005.04790 and the data set's README
(https://hatefulmemeschallenge.com); the prompt is that of OpenFlamingo's evaluation.
"""

from __future__ import annotations

from .folder import DataFolder
from .rows import Row, rows_in_lines
from .task import Example, Task

SOURCE = "https://hatefulmemeschallenge.com"
LABELS = ("no", "yes")  # of label 0 and 1
FIRST_RELEASE = {"dev_seen": "dev.jsonl"}


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the memes of ``train`` or ``dev_seen``."""
    file = folder.file(f"{split}.jsonl", *filter(None, [FIRST_RELEASE.get(split)]))
    return [_example(row, folder) for row in rows_in_lines(file, SOURCE)]


def _example(row: Row, folder: DataFolder) -> Example:
    images, _, name = row.text("img").rpartition("/")
    path = folder.directory(images or "img", containing=name) / name
    label = row.integer("label")
    if label not in (0, 1):
        raise row.error(f"label: expected 0 or 1, got {label}")
    return Example(row.where, (str(path),), row.text("text"), (LABELS[label],), LABELS)


TASK = Task(
    name="hateful_memes",
    title="Hateful Memes (dev seen)",
    source=SOURCE,
    files=("train.jsonl", "dev_seen.jsonl", "img/"),
    read=read,
    eval_split="dev_seen",
    train_split="train",
    chunk="is an image with: '{question}' written on it. Is it hateful? Answer:",
    chat="This image has the text '{question}' written on it. Is it hateful? Answer yes or no.",
    metrics=("roc_auc", "accuracy"),
    ranks_labels=True,
    separator="",
)
