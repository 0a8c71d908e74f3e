"""Dataset schemas: the formats in which instruction data is stored, recognized and read into `Sample`s.

Each module imported here registers the schemas it defines.
"""

from . import dialogues as dialogues
from . import documents as documents
from . import mimicit as mimicit
from . import preference as preference
from . import questions as questions
from .reader import RowReader
from .registry import SCHEMAS, detect_schema, register_schema
from .schema import ParsedRow, Schema, Turn

__all__ = ["SCHEMAS", "ParsedRow", "RowReader", "Schema", "Turn", "detect_schema", "register_schema"]
