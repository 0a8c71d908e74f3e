"""VizWiz-VQA: the validation set.

A file is ``[{"image", "question", "answers": [{"answer", ...}, ...], "answer_type"}, ...]`` with ten answers
each; images lie in a folder for each split. Source: https://vizwiz.org/tasks-and-datasets/vqa/
"""

from __future__ import annotations

from .cuts import cut_short_answer
from .folder import DataFolder
from .rows import Row, rows_in_list
from .task import SHORT_ANSWER_REQUEST, Example, Task

SOURCE = "https://vizwiz.org/tasks-and-datasets/vqa/"


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the questions of ``train`` or ``val``."""
    return [_example(row, folder, split) for row in rows_in_list(folder.file(f"{split}.json"), SOURCE)]


def _example(row: Row, folder: DataFolder, split: str) -> Example:
    name = row.text("image")
    path = folder.directory(split, containing=name) / name
    references = row.texts("answers", "answer")
    return Example(
        row.where, (str(path),), row.text("question"), references, category=row.text("answer_type")
    )


TASK = Task(
    name="vizwiz",
    title="VizWiz-VQA (validation)",
    source=SOURCE,
    files=("{train,val}.json", "train/, val/"),
    read=read,
    eval_split="val",
    train_split="train",
    chunk="Question:{question} Short answer:",
    chat=SHORT_ANSWER_REQUEST,
    metrics=("vqa_accuracy",),
    cut=cut_short_answer,
)
