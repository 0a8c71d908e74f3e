"""What the data folder uses of `datasets` that is not its public API, each with the reason."""

from __future__ import annotations

from typing import Any

# Opens ``hf://`` paths and files inside remote archives, as `datasets` itself does when it decodes an image.
from datasets.utils.file_utils import xopen

__all__ = ["download_cache", "xopen"]


def download_cache() -> Any:
    """Return the folder that `datasets` downloads to, whose files may be read whatever the image root."""
    from datasets import config

    return config.DOWNLOADED_DATASETS_PATH
