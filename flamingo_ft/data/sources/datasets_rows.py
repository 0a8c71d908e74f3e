"""Parquet, Arrow, folders of images, and datasets on the Hub or on disk, read by `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError
from datasets.utils import logging
from datasets.utils.file_utils import xopen
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError

from flamingo_ft.data.files import is_system_file
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message, shorten
from flamingo_ft.machine_errors import reraise_machine_error

# What loading was seen to raise for what is not there, is offline, or is damaged.
FAILURES = (
    DatasetsError,
    HfHubHTTPError,
    OSError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    KeyError,
    pa.ArrowException,
)
BATCH_ROWS = 64
REMOTE = re.compile(r"(zip://[^:]*::)?hf://")  # a file on the Hub, or in an archive there


class DatasetsRows:
    """Rows of a dataset, in Python values: images stay {"bytes", "path"}, labels become their names."""

    def __init__(self, name: str, dataset: datasets.Dataset | datasets.IterableDataset):
        self.name = name
        self.indexed = isinstance(dataset, datasets.Dataset)
        self._dataset = dataset.with_format("arrow")  # as it is stored: nothing is decoded
        self._named = {key: of for key, of in (dataset.features or {}).items() if _has_labels(of)}

    def __len__(self) -> int:
        return len(self._dataset)

    def content(self, row: int) -> dict[str, Any]:
        with reading(self.name):
            return self._row(self._dataset[row].to_pylist()[0])

    def stream(self) -> Iterator[dict[str, Any]]:
        with reading(self.name):
            for table in self._dataset.iter(batch_size=BATCH_ROWS):
                yield from map(self._row, table.to_pylist())

    def parse(self, content: dict[str, Any], where: str) -> Mapping[str, Any]:
        return {name: _fetched(value) for name, value in content.items()}

    def find(self, key: str) -> None:
        return None

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: _with_names(value, self._named.get(name)) for name, value in row.items()}


def load_files(path: Path, streaming: bool) -> DatasetsRows:
    """A Parquet or Arrow file."""
    builder = path.suffix.lower().removeprefix(".")
    return _load(str(path), builder, data_files=str(path), split="train", streaming=streaming)


def load_image_folder(path: Path, split: str, streaming: bool) -> DatasetsRows:
    """A folder of images with a metadata file, or in folders named for what they show (the column ``label``).

    Images that operating systems left there (thumbnails) are no rows.
    """
    with reading(str(path)):
        files = _files_without_leftovers(path)
    where = {"data_dir": str(path)} if files is None else {"data_files": files}
    return _load(str(path), "imagefolder", **where, split=split, streaming=streaming)


def load_folder(path: Path, split: str, streaming: bool) -> DatasetsRows:
    """A folder that `Dataset.save_to_disk` wrote, or a copy of a dataset on the Hub."""
    if (path / "dataset_dict.json").is_file():
        path = path / split
    if not (path / "dataset_info.json").is_file():
        return _load(str(path), str(path), split=split, streaming=streaming)
    with reading(str(path)):
        dataset = datasets.load_from_disk(str(path))
        return DatasetsRows(str(path), dataset.to_iterable_dataset() if streaming else dataset)


def load_hub(
    name: str, config: str | None, split: str, revision: str | None, streaming: bool
) -> DatasetsRows:
    """A dataset on the Hub."""
    where = f"{name}[{split}]"
    return _load(where, name, name=config, split=split, revision=revision, streaming=streaming)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Quietly, and with what fails told as a UserError in one line."""
    level, bars = logging.get_verbosity(), datasets.is_progress_bar_enabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except FAILURES as error:
        reraise_machine_error(error)
        remedy = "check the name, config and split, the files, and the network (or HF_HUB_OFFLINE)"
        raise UserError(f"{where}: cannot be read ({_reason(error)}); {remedy}") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _load(where: str, *args: Any, **options: Any) -> DatasetsRows:
    with reading(where):
        return DatasetsRows(where, datasets.load_dataset(*args, **options))


def _files_without_leftovers(folder: Path) -> dict[str, list[str]] | None:
    """The files of each split but what operating systems left there; None where there is nothing of that kind.

    They are left out before `datasets` looks, which skips hidden ones alone, and takes no labels from folders where
    images are at several depths.
    """

    def is_kept(path: str) -> bool:
        return not is_system_file(Path(os.path.relpath(path, folder)).as_posix())

    if all(is_kept(os.path.join(root, file)) for root, _, files in os.walk(folder) for file in files):
        return None
    splits = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    return {split: [*filter(is_kept, files)] for split, files in splits.items()}


def _reason(error: BaseException) -> str:
    """What went wrong in the first place, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shorten(error_message(error, None))


def _fetched(value: Any) -> Any:
    """With the bytes of the Hub's files in their place: only `datasets` knows the way to them."""
    if isinstance(value, list):
        return [_fetched(one) for one in value]
    path = value.get("path") if isinstance(value, dict) and {*value} == {"bytes", "path"} else None
    if path is None or value["bytes"] is not None or not _is_of_the_hub(path):
        return value
    with reading(path), xopen(path, "rb") as file:
        return {"bytes": file.read(), "path": os.path.basename(path)}


def _is_of_the_hub(path: str) -> bool:
    """Whether `datasets` itself put the path there: a file on the Hub, or one that it downloaded."""
    caches = (HF_HUB_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    real = os.path.realpath(path)
    return bool(REMOTE.match(path)) or any(
        Path(real).is_relative_to(os.path.realpath(cache)) for cache in caches
    )


def _has_labels(feature: Any) -> bool:
    inside = (
        feature.values()
        if isinstance(feature, dict)
        else [feature.feature]
        if hasattr(feature, "feature")
        else []
    )
    return isinstance(feature, datasets.ClassLabel) or any(map(_has_labels, inside))


def _with_names(value: Any, feature: Any) -> Any:
    """The value with the names of its class labels; -1 is a label that is not known."""
    if feature is None or value is None:
        return value
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, dict):
        return {name: _with_names(value[name], of) for name, of in feature.items()}
    inside = getattr(feature, "feature", None)
    return [_with_names(one, inside) for one in value] if isinstance(value, list) else value
