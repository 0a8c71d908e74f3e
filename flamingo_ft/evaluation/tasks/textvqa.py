"""TextVQA 0.5.1: the validation set.

A file is ``{"data": [{"question", "image_id", "answers": [ten texts], ...}, ...]}``; image abc is
``train_images/abc.jpg``, in training and validation. Source: https://textvqa.org/dataset/
"""

from __future__ import annotations

from .cuts import cut_short_answer
from .folder import DataFolder
from .rows import rows_under
from .task import BEAMS, SHORT_ANSWER_REQUEST, Example, Task

SOURCE = "https://textvqa.org/dataset/"
IMAGES = "train_images"
MAX_NEW_TOKENS = 10  # of OpenFlamingo's evaluation, twice that of the other VQA sets


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the questions of ``train`` or ``val``."""
    examples = []
    for row in rows_under(folder.file(f"TextVQA_0.5.1_{split}.json"), "data", SOURCE):
        name = f"{row.text('image_id')}.jpg"
        path = folder.directory(IMAGES, containing=name) / name
        examples.append(Example(row.where, (str(path),), row.text("question"), row.texts("answers")))
    return examples


TASK = Task(
    name="textvqa",
    title="TextVQA 0.5.1 (validation)",
    source=SOURCE,
    files=("TextVQA_0.5.1_{train,val}.json", "train_images/"),
    read=read,
    eval_split="val",
    train_split="train",
    chunk="Question:{question} Short answer:",
    chat=SHORT_ANSWER_REQUEST,
    metrics=("vqa_accuracy",),
    cut=cut_short_answer,
    decoding={**BEAMS, "max_new_tokens": MAX_NEW_TOKENS},
)
