"""From files of dialogues with images to batches."""

from .collate import Collator
from .media import open_medium
from .sample import Sample
from .samples import read_samples
from .sources import Source, open_source

__all__ = ["Collator", "Sample", "Source", "open_medium", "open_source", "read_samples"]
