"""The forms in which people keep samples: recognised, and read into `Sample`s."""

from .reader import RowReader
from .table import SCHEMAS, recognise

__all__ = ["SCHEMAS", "RowReader", "recognise"]
