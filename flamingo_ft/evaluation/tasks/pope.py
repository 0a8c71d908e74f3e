"""POPE: is an object in the image? Random, popular and adversarial objects, on images of COCO's val2014.

A file has a row in each line, ``{"question_id", "image", "text", "label": "yes" or "no"}``. Each of the three
files is a category of its own. An answer is "no" if its first sentence has the word no, No or not, and "yes"
otherwise. Source: https://github.com/AoiDragon/POPE, README.md and evaluate.py
"""

from __future__ import annotations

from collections.abc import Sequence

from .folder import DataFolder
from .rows import Row, rows_in_lines
from .task import SHORT_ANSWER_REQUEST, Example, Task

SOURCE = "https://github.com/AoiDragon/POPE"
SUBSETS = ("random", "popular", "adversarial")
IMAGES = "val2014"
LABELS = ("yes", "no")
NEGATIVE = {"No", "no", "not"}
MAX_NEW_TOKENS = 20


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the questions of all subsets; ``split`` is the data set that the images are from."""
    return [
        _example(row, folder, subset)
        for subset in SUBSETS
        for row in rows_in_lines(folder.file(f"{split}_pope_{subset}.json"), SOURCE)
    ]


def _example(row: Row, folder: DataFolder, subset: str) -> Example:
    name, label = row.text("image"), row.text("label")
    if label not in LABELS:
        raise row.error(f"label: expected yes or no, got {label!r}")
    path = folder.directory(IMAGES, containing=name) / name
    return Example(row.where, (str(path),), row.text("text"), (label,), category=subset)


def cut(text: str) -> str:
    """Return the answer as the publisher's evaluation counts it: yes or no."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "yes" if NEGATIVE.isdisjoint(words) else "no"


def yes_ratio(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """Return the fraction of answers that are yes; half of the right ones are."""
    return {"yes_ratio": answers.count("yes") / len(answers)}


TASK = Task(
    name="pope",
    title="POPE",
    source=SOURCE,
    files=("coco_pope_{random,popular,adversarial}.json", "val2014/"),
    read=read,
    eval_split="coco",
    train_split=None,
    chunk="Question:{question} Short answer:",
    chat=SHORT_ANSWER_REQUEST,
    metrics=("accuracy", "f1"),
    cut=cut,
    decoding={"max_new_tokens": MAX_NEW_TOKENS},
    further_scores=yes_ratio,
)
