"""GQA: the balanced questions of test-dev.

A file is ``{question id: {"question", "imageId", "answer", "types": {"structural", ...}, ...}, ...}``; image
1234 is ``images/1234.jpg``. Scored by exact match.
Source: https://cs.stanford.edu/people/dorarad/gqa/download.html and evaluate.html
"""

from __future__ import annotations

from .cuts import cut_short_answer
from .folder import DataFolder
from .rows import Row, rows_by_key
from .task import SHORT_ANSWER_REQUEST, Example, Task

SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
IMAGES = "images"


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the questions of ``train_balanced`` or ``testdev_balanced``."""
    rows = rows_by_key(folder.file(f"{split}_questions.json"), SOURCE)
    return [_example(row, folder) for row in rows.values()]


def _example(row: Row, folder: DataFolder) -> Example:
    name = f"{row.text('imageId')}.jpg"
    path = folder.directory(IMAGES, containing=name) / name
    kind = row.row("types").text("structural")
    return Example(row.where, (str(path),), row.text("question"), (row.text("answer"),), category=kind)


TASK = Task(
    name="gqa",
    title="GQA (test-dev, balanced)",
    source=SOURCE,
    files=("{train,testdev}_balanced_questions.json", "images/"),
    read=read,
    eval_split="testdev_balanced",
    train_split="train_balanced",
    chunk="Question:{question} Short answer:",
    chat=SHORT_ANSWER_REQUEST,
    metrics=("accuracy",),
    cut=cut_short_answer,
)
