"""From files of dialogues with images to batches."""

from .collate import Collator
from .samples import Sample, read_samples

__all__ = ["Collator", "Sample", "read_samples"]
