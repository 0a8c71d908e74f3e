"""From files of dialogues with images to batches."""

from .collate import Collator
from .sample import Sample
from .samples import read_samples

__all__ = ["Collator", "Sample", "read_samples"]
