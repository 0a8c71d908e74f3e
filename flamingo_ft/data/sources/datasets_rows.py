"""Parquet, Arrow, folders of images, and datasets on the Hub or on disk, read by `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetGenerationCastError, DatasetsError
from datasets.utils import logging
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError

from flamingo_ft.data.compat import download_cache, xopen
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message, shorten
from flamingo_ft.machine_errors import reraise_machine_error

from .image_folder import split_files

# What loading raises for data that does not exist, is damaged, or is on the Hub while offline.
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
    """Rows of a dataset as Python values: images stay {"bytes", "path"}, class labels become their names."""

    def __init__(self, name: str, dataset: datasets.Dataset | datasets.IterableDataset):
        self.name = name
        self.indexed = isinstance(dataset, datasets.Dataset)
        self._dataset: Any = dataset.with_format("arrow")  # as it is stored: nothing is decoded
        self._labelled = {
            name: feature for name, feature in (dataset.features or {}).items() if _has_labels(feature)
        }

    def __len__(self) -> int:
        return len(self._dataset)

    def content(self, row: int) -> dict[str, Any]:
        with dataset_errors(self.name):
            return self._row(self._dataset[row].to_pylist()[0])

    def stream(self) -> Iterator[dict[str, Any]]:
        with dataset_errors(self.name):
            for table in self._dataset.iter(batch_size=BATCH_ROWS):
                yield from map(self._row, table.to_pylist())

    def parse(self, content: dict[str, Any], where: str) -> Mapping[str, Any]:
        return {name: _with_remote_bytes(value) for name, value in content.items()}

    def find(self, key: str) -> None:
        return None

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: _with_label_names(value, self._labelled.get(name)) for name, value in row.items()}


def open_table(path: Path, indexed: bool) -> DatasetsRows:
    """Open a Parquet or Arrow file."""
    builder = path.suffix.lower().removeprefix(".")
    return _load(str(path), builder, data_files=str(path), split="train", streaming=not indexed)


def load_image_folder(path: Path, split: str, streaming: bool) -> DatasetsRows:
    """Open a folder of images with a metadata file, or with one folder per class, which is the ``label``.

    Thumbnails and other images that operating systems left there are not rows.
    """
    return _load(str(path), "imagefolder", data_files=split_files(path), split=split, streaming=streaming)


def load_folder(path: Path, split: str, streaming: bool) -> DatasetsRows:
    """Open a folder that `Dataset.save_to_disk` wrote, or a copy of a dataset on the Hub."""
    if (path / "dataset_dict.json").is_file():
        path = path / split
    if not (path / "dataset_info.json").is_file():
        return _load(str(path), str(path), split=split, streaming=streaming)
    with dataset_errors(str(path)):
        dataset = cast(datasets.Dataset, datasets.load_from_disk(str(path)))
        return DatasetsRows(str(path), dataset.to_iterable_dataset() if streaming else dataset)


def load_hub(
    name: str,
    *,
    config: str | None,
    data_files: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
) -> DatasetsRows:
    """Open a dataset on the Hub. data_files: those of the split, by default all that are named like it."""
    where = f"{name}[{data_files or split}]"
    files = None if data_files is None else {split: data_files}
    return _load(
        where, name, name=config, data_files=files, split=split, revision=revision, streaming=streaming
    )


@contextmanager
def dataset_errors(where: str) -> Generator[None]:
    """Silence `datasets`, and convert its errors to a one-line UserError."""
    level, bars = logging.get_verbosity(), datasets.is_progress_bar_enabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except DatasetGenerationCastError:  # LLaVA-Instruct-150K is one: several lists of conversations
        remedy = "set data_files to the one that you need"
        raise UserError(
            f"{where}: cannot be read as one, its files have different columns; {remedy}"
        ) from None
    except FAILURES as error:
        reraise_machine_error(error)
        remedy = "check the name, config and split, the files, and the network (or HF_HUB_OFFLINE)"
        raise UserError(f"{where}: cannot be read ({_root_cause(error)}); {remedy}") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _load(where: str, *args: Any, **options: Any) -> DatasetsRows:
    with dataset_errors(where):
        return DatasetsRows(where, datasets.load_dataset(*args, **options))


def _root_cause(error: BaseException) -> str:
    """Return the message of the first error of a chain, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shorten(error_message(error, None))


def _with_remote_bytes(value: Any) -> Any:
    """Return a value with the content of files on the Hub, whose paths only `datasets` can open."""
    if isinstance(value, list):
        return [_with_remote_bytes(one) for one in value]
    path = value.get("path") if isinstance(value, dict) and {*value} == {"bytes", "path"} else None
    if path is None or value["bytes"] is not None or not _is_from_hub(path):
        return value
    with dataset_errors(path), xopen(path, "rb") as file:
        return {"bytes": file.read(), "path": os.path.basename(path)}


def _is_from_hub(path: str) -> bool:
    """Whether `datasets` itself put the path there: a file on the Hub, or one that it downloaded."""
    if REMOTE.match(path):
        return True
    caches = (HF_HUB_CACHE, download_cache())
    return any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(cache)) for cache in caches)


def _has_labels(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    if isinstance(feature, dict):
        return any(map(_has_labels, feature.values()))
    return hasattr(feature, "feature") and _has_labels(feature.feature)


def _with_label_names(value: Any, feature: Any) -> Any:
    """Return a value with the names of its class labels; None for the unknown label -1."""
    if feature is None or value is None:
        return value
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, dict):
        return {name: _with_label_names(value[name], inside) for name, inside in feature.items()}
    inside = getattr(feature, "feature", None)
    return [_with_label_names(one, inside) for one in value] if isinstance(value, list) else value
