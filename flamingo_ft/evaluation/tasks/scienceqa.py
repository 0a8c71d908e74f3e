"""ScienceQA: multiple choice, the questions with an image and those of text alone.

``problems.json`` is ``{problem: {"question", "choices", "answer" (index), "hint", "image" (a file name or
null), ...}, ...}``, ``pid_splits.json`` ``{split: [problem, ...], ...}``; the image of problem 7 of the test
split is ``test/7/image.png``. The letters of the choices are ranked.
Source: https://github.com/lupantech/ScienceQA, README.md and models/base_prompt.py (prompt QCM-A)
"""

from __future__ import annotations

from .folder import DataFolder
from .rows import Row, as_row, read_json, rows_by_key
from .task import Example, Task

SOURCE = "https://github.com/lupantech/ScienceQA"
LETTERS = ("A", "B", "C", "D", "E")
NO_HINT = "N/A"
IMAGE, TEXT = "image", "text only"


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the problems of ``train``, ``val`` or ``test``."""
    problems = rows_by_key(folder.file("problems.json"), SOURCE)
    file = folder.file("pid_splits.json")
    examples = []
    for number in as_row(read_json(file, SOURCE), str(file), SOURCE).texts(split):
        if number not in problems:
            raise Row({}, f"{file}: {split}", SOURCE).error(f"problems.json has no problem {number!r}")
        examples.append(_example(problems[number], folder, split, number))
    return examples


def _example(row: Row, folder: DataFolder, split: str, number: str) -> Example:
    images: tuple[str, ...] = ()
    if row.value.get("image") is not None:
        inside = f"{number}/{row.text('image')}"
        images = (str(folder.directory(split, containing=inside) / inside),)
    choices, answer = row.texts("choices"), row.integer("answer")
    if len(choices) > len(LETTERS):
        raise row.error(f"choices: expected at most {len(LETTERS)}, got {len(choices)}")
    if not 0 <= answer < len(choices):
        raise row.error(f"answer: expected the index of one of {len(choices)} choices, got {answer}")
    labels = LETTERS[: len(choices)]
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(labels, choices, strict=True))
    hint = row.text("hint").strip() or NO_HINT
    question = f"{row.text('question')}\nContext: {hint}\nOptions: {options}"
    return Example(row.where, images, question, (labels[answer],), labels, IMAGE if images else TEXT)


TASK = Task(
    name="scienceqa",
    title="ScienceQA (test)",
    source=SOURCE,
    files=("problems.json", "pid_splits.json", "train/, test/"),
    read=read,
    eval_split="test",
    train_split="train",
    chunk="Question: {question}\nAnswer:",
    # LLaVA-1.5's request for a choice
    chat="{question}\nAnswer with the option's letter from the given choices directly.",
    metrics=("accuracy",),
    ranks_labels=True,
)
