"""OK-VQA: the test set, which is asked about images of COCO's val2014.

See `vqa_format` for the format; the names of its files are those of the first VQA, without ``v2_``. Its
answers are stemmed. OpenFlamingo's evaluation stems predictions too, with NLTK; here they are scored as
generated, so "horses" does not match "horse". Source: https://okvqa.allenai.org/download.html
"""

from __future__ import annotations

from .cuts import cut_short_answer
from .folder import DataFolder
from .task import SHORT_ANSWER_REQUEST, Example, Task
from .vqa_format import read_vqa


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the questions of ``train2014`` or ``val2014``."""
    questions = f"OpenEnded_mscoco_{split}_questions.json"
    return read_vqa(folder, questions, f"mscoco_{split}_annotations.json", split)


TASK = Task(
    name="ok_vqa",
    title="OK-VQA (test)",
    source="https://okvqa.allenai.org/download.html",
    files=(
        "OpenEnded_mscoco_{train2014,val2014}_questions.json",
        "mscoco_{train2014,val2014}_annotations.json",
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
