"""MME: two questions, one with the answer yes and one with no, about each image of 14 subsets.

The folder of a subset has the images and a text file of the same name for each, with two lines "question,
tab, Yes or No"; in some subsets the images are in ``images`` and the texts in ``questions_answers_YN``. A
subset's score is its accuracy plus its accuracy+, the fraction of images with both answers right, in percent,
at most 200. An answer is what its first four characters contain, yes or no. Source:
https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation, its eval_tool
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from flamingo_ft.data.files import is_system_file
from flamingo_ft.errors import UserError

from .folder import IMAGE_SUFFIXES, DataFolder
from .rows import read_text
from .task import Example, Task

SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
QUESTIONS_PER_IMAGE = 2
PREFIX = 4  # characters that decide
MAX_NEW_TOKENS = 20


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the questions of all subsets."""
    base = _base(folder)
    return [example for subset in (*PERCEPTION, *COGNITION) for example in _read_subset(base, subset)]


def _base(folder: DataFolder) -> Path:
    """Return the folder that the subsets are in."""
    parents = [path.parent for path in folder.directories(PERCEPTION[0])]
    whole = [path for path in parents if all((path / name).is_dir() for name in (*PERCEPTION, *COGNITION))]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise UserError(f"{folder.root}: got MME {len(whole)} times, {whole[0]} and {whole[1]}; name one")
    if not parents:
        raise UserError(f"{folder.root}: no folder {PERCEPTION[0]}; get the subsets of MME from {SOURCE}")
    missing = [name for name in (*PERCEPTION, *COGNITION) if not (parents[0] / name).is_dir()]
    raise UserError(f"{parents[0]}: no folder {', '.join(missing)}; get the subsets of MME from {SOURCE}")


def _read_subset(base: Path, subset: str) -> list[Example]:
    texts = images = base / subset
    if (images / "images").is_dir():
        texts, images = images / "questions_answers_YN", images / "images"
    paths = {path.stem: path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    files = [path for path in sorted(texts.glob("*.txt")) if not is_system_file(path.name)]
    if not files:
        raise UserError(f"{texts}: no text files of questions; get the subset from {SOURCE}")
    return [
        example
        for file in files
        for example in _read_image(file, str(paths.get(file.stem, images / f"{file.stem}.jpg")), subset)
    ]


def _read_image(file: Path, image: str, subset: str) -> list[Example]:
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if len(lines) != QUESTIONS_PER_IMAGE:
        raise UserError(
            f"{file}: expected {QUESTIONS_PER_IMAGE} questions, got {len(lines)}; get it from {SOURCE}"
        )
    examples = []
    for number, line in enumerate(lines):
        question, _, answer = line.strip().partition("\t")
        answer = answer.strip().lower()
        if answer not in ("yes", "no"):
            raise UserError(
                f"{file}: row {number}: expected a question, a tab and Yes or No, got {line[:80]!r}; "
                f"get it from {SOURCE}"
            )
        where, group = f"{file}: row {number}", f"{subset}/{file.stem}"
        examples.append(Example(where, (image,), question, (answer,), category=subset, group=group))
    return examples


def cut(text: str) -> str:
    """Return the answer as the publisher's evaluation counts it: yes, no or other."""
    prefix = text.lower()[:PREFIX]
    return next((answer for answer in ("yes", "no") if answer in prefix), "other")


def scores(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """Return accuracy+ (0..1) and score (0..200) of each subset, and the sums of perception and cognition.

    A sum is left out where a subset of it has no examples.
    """
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for example, answer in zip(examples, answers, strict=True):
        right[example.category][example.group].append(answer == example.references[0])
    values = {}
    for subset, groups in right.items():
        single = [is_right for group in groups.values() for is_right in group]
        plus = sum(map(all, groups.values())) / len(groups)
        values[f"{subset}_accuracy_plus"] = plus
        values[f"{subset}_score"] = 100 * (sum(single) / len(single) + plus)
    for name, subsets in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if all(subset in right for subset in subsets):
            values[f"{name}_score"] = sum(values[f"{subset}_score"] for subset in subsets)
    return values


TASK = Task(
    name="mme",
    title="MME",
    source=SOURCE,
    files=("a folder for each of the 14 subsets: existence/, count/, ...",),
    read=read,
    eval_split="all",
    train_split=None,
    chunk="Question:{question} Short answer:",
    chat="{question}",  # it ends with "Please answer yes or no."
    metrics=("accuracy",),
    cut=cut,
    decoding={"max_new_tokens": MAX_NEW_TOKENS},
    further_scores=scores,
)
