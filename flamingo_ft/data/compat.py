"""What the data folder uses of `datasets` that is not its public API, each with the reason."""

from __future__ import annotations

from typing import Any

# Which files of a folder belong to which split. `load_dataset` decides it by itself, but takes no filter:
# files that operating systems left behind would become rows.
from datasets.data_files import DataFilesDict, get_data_patterns

# Opens ``hf://`` paths and files inside remote archives, as `datasets` itself does when it decodes an image.
from datasets.utils.file_utils import xopen

__all__ = ["download_cache", "split_files", "xopen"]


def split_files(folder: str) -> dict[str, list[str]]:
    """Return the files of each split in a folder, as `load_dataset` would choose them."""
    return dict(DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder))


def download_cache() -> Any:
    """Return the folder that `datasets` downloads to, whose files may be read whatever the image root."""
    from datasets import config

    return config.DOWNLOADED_DATASETS_PATH
