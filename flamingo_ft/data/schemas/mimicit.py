"""MIMIC-IT: instructions in one JSON file, base64 images in another; other rows are in-context examples."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from flamingo_ft.data.fields import Row, has_value, list_field, nonempty_text_field
from flamingo_ft.data.files import MappedFile
from flamingo_ft.errors import UserError

from .schema import DataFile, MediaRef, ParsedRow, Schema, Turn, has_columns, register_schema

IMAGES_FILE = "images_file"  # key of ``columns`` that names the file of images
SUFFIX = "_instructions"
# One entry of an images file. Base64 has no escapes, so the text between the quotes is the value.
ENTRY = re.compile(rb'"([^"\\]+)"\s*:\s*"([^"\\]*)"')


class ImagesById:
    """A memory-mapped JSON file of id -> base64; only the offsets of the images are held in memory."""

    def __init__(self, path: Path):
        self._file = MappedFile(path)
        self._spans: dict[str, tuple[int, int]] | None = None

    def get(self, key: str) -> str | None:
        """Return the image in base64; None if the file has no such id."""
        if self._spans is None:
            self._spans = dict(self._entries(self._file.view()))
        span = self._spans.get(key)
        return None if span is None else self._file.view()[slice(*span)].decode("ascii", "replace")

    def _entries(self, view: mmap.mmap | bytes) -> Iterator[tuple[str, tuple[int, int]]]:
        for entry in ENTRY.finditer(view):
            yield entry[1].decode("utf-8", "replace"), entry.span(2)

    def __str__(self) -> str:
        return str(self._file.path)


def images_file(instructions: Path, named: str | None, image_root: Path) -> Path:
    """Return the file of images that belongs to a file of instructions.

    ``LA_T2T_instructions.json`` goes with the first that exists of ``LA_T2T_images.json``,
    ``LA_images.json``, ``LA.json`` and ``LA_00.json`` beside it.

    Args:
        named: ``columns: {images_file: ...}``, relative to ``image_root``; replaces the search.
    """
    stem = instructions.stem.removesuffix(SUFFIX)
    family = stem.partition("_")[0]
    usual = [f"{stem}_images.json", f"{family}_images.json", f"{family}.json", f"{family}_00.json"]
    candidates = [image_root / named] if named else [instructions.with_name(name) for name in usual]
    path = next((path for path in candidates if path.is_file() and path != instructions), None)
    if path is None:
        names = ", ".join(candidate.name for candidate in candidates)
        raise UserError(
            f"{instructions}: no file with its images, looked for {names}; "
            f"name it: columns: {{{IMAGES_FILE}: PATH}}"
        )
    return path


class MimicitParser:
    """Parses the rows of one file of instructions."""

    def __init__(self, file: DataFile):
        self._find = file.find
        self._images = ImagesById(images_file(file.path, file.options.get(IMAGES_FILE), file.image_root))

    def __call__(self, row: Row, where: str) -> ParsedRow:
        """Parse the in-context examples (``rel_ins_ids``) in order, then the row's own question."""
        turns: list[Turn] = []
        media: list[MediaRef] = []
        examples = list_field(row, "rel_ins_ids", where) if has_value(row, "rel_ins_ids") else []
        for index, key in enumerate(examples):
            place = f"{where}: rel_ins_ids[{index}]"
            example = self._find(str(key))
            if example is None:
                raise UserError(
                    f"{place}: no row of the file has this id, got {key!r}; remove it or add the row"
                )
            self._append(example, place, turns, media)
        self._append(row, where, turns, media)
        return ParsedRow(turns, media)

    def _append(self, row: Row, where: str, turns: list[Turn], media: list[MediaRef]) -> None:
        keys = list_field(row, "image_ids", where)
        media += [self._image(key, f"{where}: image_ids[{index}]") for index, key in enumerate(keys)]
        question = {"type": "text", "text": nonempty_text_field(row, "instruction", where)}
        answer = {"type": "text", "text": nonempty_text_field(row, "answer", where)}
        turns.append(Turn("user", [*[{"type": "image"} for _ in keys], question], f"{where}: instruction"))
        turns.append(Turn("assistant", [answer], f"{where}: answer"))

    def _image(self, key: object, where: str) -> MediaRef:
        data = self._images.get(str(key))
        if data is None:
            raise UserError(
                f"{where}: {self._images} has no such image, got {key!r}; add the image or remove the row"
            )
        return MediaRef(data if data.startswith("data:") else f"data:;base64,{data}", where)


register_schema(
    Schema(
        "mimicit",
        fields=("instruction", "answer", "image_ids", "rel_ins_ids", "id", IMAGES_FILE),
        matches=has_columns("instruction", "answer", "image_ids"),
        open_file=MimicitParser,
        options=(IMAGES_FILE,),
        reads_common_media=False,
    )
)
