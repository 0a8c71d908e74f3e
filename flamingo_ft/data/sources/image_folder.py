"""Which files of a folder of images belong to which split.

`datasets` also searches file names and class folders for the names of splits: a picture of a train whose
name contains "train" makes it leave out all other pictures.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath

from flamingo_ft.data.files import is_system_file

from .tar_samples import IMAGES

# By the names that `datasets` knows for their folders.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
HIDDEN = (".", "__")


def split_files(folder: Path) -> dict[str, list[str]]:
    """Return the files of each split, hidden and system files left out.

    Folders are splits if all images are in folders that are named like one, at the same depth. Otherwise all
    files are the split "train".
    """
    files = sorted(file for file in _files(folder) if _is_data(file))
    depth = _depth_of_splits([file for file in files if is_image(file)])
    splits: dict[str, list[str]] = defaultdict(list)
    for file in files:
        split = "train" if depth is None else _split_at(file, depth)
        if split is not None:
            splits[split].append(str(folder / file))
    return dict(splits)


def is_image(file: PurePath) -> bool:
    """Whether a file has the suffix of an image."""
    return file.suffix.lower().removeprefix(".") in IMAGES


def _files(folder: Path) -> list[PurePath]:
    return [
        PurePath(os.path.relpath(os.path.join(parent, name), folder))
        for parent, _, names in os.walk(folder)
        for name in names
    ]


def _is_data(file: PurePath) -> bool:
    return not (is_system_file(file.as_posix()) or any(part.startswith(HIDDEN) for part in file.parts))


def _depth_of_splits(images: Sequence[PurePath]) -> int | None:
    """Return at which depth the folders of all images are named like splits, if at any."""
    deepest = min((len(image.parts) - 1 for image in images), default=0)
    return next((d for d in range(deepest) if all(_split_at(image, d) for image in images)), None)


def _split_at(file: PurePath, depth: int) -> str | None:
    folders = file.parts[:-1]
    return SPLITS.get(folders[depth].lower()) if depth < len(folders) else None
