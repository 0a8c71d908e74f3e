"""From data files to batches: sources and schemas -> samples -> token ids, labels and images -> tensors."""

from .encode import Dropped, Encoded, encode, encode_within
from .media import open_medium
from .opened_data import OpenedData, open_data
from .pairs import preference_row
from .render import apply_template
from .sample import Sample
from .sources import Source, open_source
from .sources.source import read_samples

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
