"""ImageNet (ILSVRC2012): the validation set, in a folder for each synset, by ranking all class names.

``train/n01440764/*.JPEG`` and ``val/n01440764/*.JPEG`` (valprep.sh sorts the validation images like that),
and the names of the synsets, one in a line after its synset: CLIP's names, which OpenFlamingo is evaluated
with, in CoOp's ``classnames.txt``, or the first of each line of Kaggle's ``LOC_synset_mapping.txt``. Synsets
of the same name count as one. Sources: https://image-net.org/challenges/LSVRC/2012/,
https://github.com/KaiyangZhou/CoOp (DATASETS.md)
"""

from __future__ import annotations

import re
from pathlib import Path

from flamingo_ft.data.files import is_system_file
from flamingo_ft.errors import UserError

from .folder import IMAGE_SUFFIXES, DataFolder
from .rows import read_text
from .task import Example, Task

SOURCE = "https://image-net.org/challenges/LSVRC/2012/"
NAMES, SYNONYMS = "classnames.txt", "LOC_synset_mapping.txt"
SYNSET = re.compile(r"n\d{8}")
UNSORTED = "sort the images into a folder for each synset, as valprep.sh does"


def read(folder: DataFolder, split: str) -> list[Example]:
    """Return the images of ``train`` or ``val``, by synset."""
    file = folder.file(NAMES, SYNONYMS)
    names = read_names(file)
    labels = tuple(dict.fromkeys(names.values()))
    examples = []
    for synset in _synset_folders(folder, split, next(iter(names))):
        if synset.name not in names:
            raise UserError(f"{synset}: {file} has no name for it; add a line that begins with {synset.name}")
        references = (names[synset.name],)
        for path in _images(synset):
            examples.append(Example(path, (path,), "", references, labels))
    return examples


def read_names(file: Path) -> dict[str, str]:
    """Return synset -> name. Raises UserError for a line that is not a synset and its name."""
    names = {}
    for number, line in enumerate(filter(str.strip, read_text(file).splitlines())):
        synset, _, name = line.strip().partition(" ")
        if file.name == SYNONYMS:
            name = name.partition(",")[0]
        if not SYNSET.fullmatch(synset) or not name.strip():
            raise UserError(
                f"{file}: row {number}: expected a synset and its name, such as 'n01440764 tench', "
                f"got {line[:80]!r}; correct the line"
            )
        names[synset] = name.strip()
    if not names:
        raise UserError(f"{file}: is empty; write a line for each synset, such as 'n01440764 tench'")
    return names


def _synset_folders(folder: DataFolder, split: str, first: str) -> list[Path]:
    images = folder.directory(split, containing=first)
    found = [path for path in sorted(images.iterdir()) if SYNSET.fullmatch(path.name) and path.is_dir()]
    if not found:
        raise UserError(f"{images}: has no folder of a synset, such as {first}; {UNSORTED}")
    return found


def _images(synset: Path) -> list[str]:
    return sorted(
        str(path)
        for path in synset.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_system_file(path.name)
    )


TASK = Task(
    name="imagenet",
    title="ImageNet (validation)",
    source=SOURCE,
    files=(f"{NAMES} or {SYNONYMS}", "train/n*/, val/n*/"),
    read=read,
    eval_split="val",
    train_split="train",
    chunk="Output:",
    chat="What is the main object in this image? Answer with its name.",
    metrics=("accuracy", "top_5"),
    ranks_labels=True,
    separator="",
)
