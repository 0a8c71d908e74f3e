"""VQAv2: the validation set, whose answers are public.

See `vqa_format` for the format. Source: https://visualqa.org/download.html
"""

from __future__ import annotations

from .cuts import cut_short_answer
from .folder import DataFolder
from .task import SHORT_ANSWER_REQUEST, Example, Task
from .vqa_format import read_vqa


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the questions of ``train2014`` or ``val2014``."""
    questions = f"v2_OpenEnded_mscoco_{split}_questions.json"
    return read_vqa(folder, questions, f"v2_mscoco_{split}_annotations.json", split)


TASK = Task(
    name="vqav2",
    title="VQAv2 (validation)",
    source="https://visualqa.org/download.html",
    files=(
        "v2_OpenEnded_mscoco_{train2014,val2014}_questions.json",
        "v2_mscoco_{train2014,val2014}_annotations.json",
        "train2014/, val2014/",
    ),
    read=read,
    eval_split="val2014",
    train_split="train2014",
    chunk="Question:{question} Short answer:",
    chat=SHORT_ANSWER_REQUEST,
    metrics=("vqa_accuracy",),
    cut=cut_short_answer,
)
