"""From an entry of the recipe to its files, each read by what its kind takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flamingo_ft.config import DataSource
from flamingo_ft.data.file_names import on_disk
from flamingo_ft.errors import UserError

from . import datasets_rows
from .json_rows import JsonRows
from .leftovers import is_leftover
from .members import IMAGES
from .rows import Rows
from .tars import TarRows
from .text_rows import DelimitedRows, JsonLines

PATTERN_MARKS = "*?["
READERS = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonRows,
    ".csv": DelimitedRows,
    ".tsv": DelimitedRows,
    ".tar": TarRows,
    ".tgz": TarRows,
    ".tar.gz": TarRows,
    ".parquet": None,  # these two through `datasets`
    ".arrow": None,
}
KINDS = ", ".join(READERS)


def name_of(entry: DataSource) -> str:
    return str(entry.path) if entry.path is not None else f"{entry.hub}[{entry.split}]"


def root_of(entry: DataSource) -> Path | None:
    """The folder that image paths start from; None for the Hub's rows where the recipe names none."""
    if entry.image_root is not None or entry.path is None:
        return entry.image_root and on_disk(entry.image_root)
    path = on_disk(entry.path)
    return path if path.is_dir() else path.parent


def open_files(entry: DataSource) -> list[Rows]:
    """The files of an entry, in the order of their names."""
    if entry.path is None:
        return [datasets_rows.load_hub(entry.hub, entry.config, entry.split, entry.revision, entry.streaming)]
    path = on_disk(entry.path)
    if path.is_dir():
        return [_open_folder(path, entry)]
    return [_open_file(path, entry.streaming) for path in _matching(path)]


def _matching(path: Path) -> Sequence[Path]:
    """The file itself, or all that fit where its name is a pattern, but what operating systems left there."""
    if path.is_file():
        return [path]
    found = sorted(path.parent.glob(path.name)) if any(mark in path.name for mark in PATTERN_MARKS) else []
    files = [one for one in found if one.is_file() and not is_leftover(one.name)]
    if not files:
        raise UserError(
            f"{path}: no such data file; check the path (a recipe's paths start from the recipe's folder)"
        )
    return files


def _open_file(path: Path, streaming: bool) -> Rows:
    name = path.name.lower()
    suffix = next((suffix for suffix in READERS if name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(
            f"{path}: found a {path.suffix or 'nameless'} file, wanted one of {KINDS}, or a folder of images"
        )
    reader = READERS[suffix]
    return (
        datasets_rows.load_files(path, streaming) if reader is None else reader(path, indexed=not streaming)
    )


def _open_folder(path: Path, entry: DataSource) -> Rows:
    """A folder of images, or of a dataset's files."""
    holds_images = any(
        _is_image(file) and not is_leftover(str(file.relative_to(path))) for file in path.rglob("*")
    )
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    load = datasets_rows.load_image_folder if holds_images and not saved else datasets_rows.load_folder
    return load(path, entry.split, entry.streaming)


def _is_image(file: Path) -> bool:
    return file.suffix.lower().removeprefix(".") in IMAGES
