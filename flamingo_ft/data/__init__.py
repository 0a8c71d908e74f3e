"""From files of dialogues with images to batches."""

from .media import open_medium
from .mixture import OpenedData, open_data
from .sample import Sample
from .samples import read_samples
from .sources import Source, open_source

__all__ = ["OpenedData", "Sample", "Source", "open_data", "open_medium", "open_source", "read_samples"]
