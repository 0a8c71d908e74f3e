"""From files of dialogues with images to batches."""

from .collate import Collator
from .encode import Encoded, encode
from .packing import collate_packed, pack
from .preference import preference_row
from .sample import Sample
from .samples import read_samples
from .templates import apply_template
from .too_long import Dropped, encode_within

__all__ = [
    "Collator",
    "Dropped",
    "Encoded",
    "Sample",
    "apply_template",
    "collate_packed",
    "encode",
    "encode_within",
    "pack",
    "preference_row",
    "read_samples",
]
