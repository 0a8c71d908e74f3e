"""The folder of a task's published files: annotation files and image folders are found by their names."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from flamingo_ft.data.files import is_system_file
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import shorten

ANNOTATION_SUFFIXES = (
    ".json",
    ".jsonl",
    ".txt",
)  # the names of images, of which there may be millions, are not kept
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")  # in lower case


class DataFolder:
    """A folder that holds the files of a task, wherever they lie in it.

    source: URL of the publisher's description, named in errors. Raises UserError if there is no such folder.
    """

    def __init__(self, root: str | Path, source: str):
        self.root, self.source = Path(root), source
        if not self.root.is_dir():
            raise UserError(
                f"{shorten(root)}: no such folder; name the folder that the files of {source} are in"
            )

    def file(self, *names: str) -> Path:
        """Return the file of the first of these names that exists.

        Raises UserError if there is none, and if there are several files of that name.
        """
        for name in names:
            found = self._files.get(name, [])
            if len(found) > 1:
                raise self._ambiguous(f"files named {name}", found)
            if found:
                return found[0]
        raise UserError(
            f"{self.root}: no file {' or '.join(names)}; get it from {self.source}, "
            "or name the folder that it is in"
        )

    def directory(self, *names: str, containing: str) -> Path:
        """Return the folder of one of these names; of several, the one that contains this file or folder.

        Raises UserError if there is none, and if several contain it.
        """
        found = self.directories(*names)
        if len(found) == 1:
            return found[0]
        having = [folder for folder in found if (folder / containing).exists()]
        if len(having) > 1:
            raise self._ambiguous(f"folders named {having[0].name} with {containing}", having)
        if having:
            return having[0]
        raise UserError(
            f"{self.root}: no folder {' or '.join(names)} with {containing}; "
            f"unpack the images of {self.source} there"
        )

    def directories(self, *names: str) -> list[Path]:
        """Return all folders of these names."""
        return [folder for name in names for folder in self._directories.get(name, [])]

    def _ambiguous(self, what: str, found: list[Path]) -> UserError:
        listed = " and ".join(str(path) for path in found[:2])
        return UserError(f"{self.root}: got {len(found)} {what}, {listed}; name the folder of one of them")

    @property
    def _files(self) -> dict[str, list[Path]]:
        return self._index[0]

    @property
    def _directories(self) -> dict[str, list[Path]]:
        return self._index[1]

    @cached_property
    def _index(self) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        """Annotation files and folders by name; the root is among the folders."""
        files, folders = defaultdict(list), defaultdict(list)
        for folder, names in _walk(self.root):
            folders[folder.resolve().name if folder == self.root else folder.name].append(folder)
            for name in names:
                if name.lower().endswith(ANNOTATION_SUFFIXES) and not is_system_file(name):
                    files[name].append(folder / name)
        return files, folders


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder and the names of its files; linked folders too, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_system_file(f"{name}/file"))
        yield Path(folder), names
