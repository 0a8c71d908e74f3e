"""MIMIC-IT: instructions in one JSON file, their images as base64 in another, other instructions as examples."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from flamingo_ft.data.fields import Row, has_value, list_field, nonempty_text_field
from flamingo_ft.data.files import MappedFile
from flamingo_ft.errors import UserError

from .schema import MediaRef, ParsedRow, Turn

IMAGES_FILE = "images_file"
SUFFIX = "_instructions"
# One entry of an images file. Base64 has no escapes, so its text is the value.
ENTRY = re.compile(rb'"([^"\\]+)"\s*:\s*"([^"\\]*)"')


class ImagesById:
    """A JSON file of id -> base64, of which only the places of its images are kept in memory."""

    def __init__(self, path: Path):
        self._file = MappedFile(path)
        self._places: dict[str, tuple[int, int]] | None = None

    def get(self, key: str) -> str | None:
        """The image in base64."""
        if self._places is None:
            self._places = dict(self._entries(self._file.view()))
        place = self._places.get(key)
        return None if place is None else self._file.view()[slice(*place)].decode("ascii", "replace")

    def _entries(self, view: mmap.mmap | bytes) -> Iterator[tuple[str, tuple[int, int]]]:
        for entry in ENTRY.finditer(view):
            yield entry[1].decode("utf-8", "replace"), entry.span(2)

    def __str__(self) -> str:
        return str(self._file.path)


def images_file(instructions: Path, named: str | None, root: Path) -> Path:
    """The file of images that belongs to a file of instructions.

    named: what `columns: {images_file: ...}` says, from the image root. Else, for `LA_T2T_instructions.json`, the first
    that is there of `LA_T2T_images.json`, `LA_images.json`, `LA.json` and `LA_00.json`, beside it.
    """
    stem = instructions.stem.removesuffix(SUFFIX)
    family = stem.partition("_")[0]
    usual = [f"{stem}_images.json", f"{family}_images.json", f"{family}.json", f"{family}_00.json"]
    candidates = [root / named] if named else [instructions.with_name(name) for name in usual]
    found = next((path for path in candidates if path.is_file() and path != instructions), None)
    if found is None:
        names = ", ".join(path.name for path in candidates)
        raise UserError(
            f"{instructions}: found no file of its images ({names}); name it: columns: {{{IMAGES_FILE}: PATH}}"
        )
    return found


def read_mimicit(row: Row, where: str, find: Callable[[str], Row | None], images: ImagesById) -> ParsedRow:
    """The row's examples (``rel_ins_ids``) in order, then its own instruction; images, instruction, answer of each."""
    turns, media = [], []
    examples = list_field(row, "rel_ins_ids", where) if has_value(row, "rel_ins_ids") else []
    for index, key in enumerate(examples):
        place = f"{where}: rel_ins_ids[{index}]"
        example = find(str(key))
        if example is None:
            raise UserError(f"{place}: found {key!r}, which is no row of the file; remove it or add the row")
        _append(example, place, images, turns, media)
    _append(row, where, images, turns, media)
    return ParsedRow(turns, media)


def _append(row: Row, where: str, images: ImagesById, turns: list[Turn], media: list[MediaRef]) -> None:
    keys = list_field(row, "image_ids", where)
    media += [_image(key, f"{where}: image_ids[{index}]", images) for index, key in enumerate(keys)]
    question = {"type": "text", "text": nonempty_text_field(row, "instruction", where)}
    answer = {"type": "text", "text": nonempty_text_field(row, "answer", where)}
    turns.append(Turn("user", [*[{"type": "image"} for _ in keys], question], f"{where}: instruction"))
    turns.append(Turn("assistant", [answer], f"{where}: answer"))


def _image(key: object, where: str, images: ImagesById) -> MediaRef:
    data = images.get(str(key))
    if data is None:
        raise UserError(f"{where}: found {key!r}, which is not in {images}; add the image or remove the row")
    return MediaRef(data if data.startswith("data:") else f"data:;base64,{data}", where)
