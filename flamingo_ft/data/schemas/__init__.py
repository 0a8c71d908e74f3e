"""The forms in which people keep samples: recognised, and read into `Sample`s."""

from .reader import RowReader
from .table import SCHEMAS, detect_schema

__all__ = ["SCHEMAS", "RowReader", "detect_schema"]
