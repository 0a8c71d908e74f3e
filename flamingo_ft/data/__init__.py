"""From files as people have them to batches."""

from .encode import Encoded, encode
from .media import open_medium
from .mixture import OpenedData, open_data
from .preference import preference_row
from .sample import Sample
from .samples import read_samples
from .sources import Source, open_source
from .templates import apply_template
from .too_long import Dropped, encode_within

__all__ = [
    "Dropped",
    "Encoded",
    "OpenedData",
    "Sample",
    "Source",
    "apply_template",
    "encode",
    "encode_within",
    "open_data",
    "open_medium",
    "open_source",
    "preference_row",
    "read_samples",
]
