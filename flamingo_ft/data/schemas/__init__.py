"""Dataset schemas: the formats in which instruction data is stored, recognized and read into `Sample`s.

Each module imported here registers the schemas it defines.
"""

from . import cauldron as cauldron
from . import dialogues as dialogues
from . import documents as documents
from . import mimicit as mimicit
from . import questions as questions
from .reader import RowReader
from .schema import SCHEMAS, ParsedRow, Schema, Turn, detect_schema, register_schema

__all__ = ["SCHEMAS", "ParsedRow", "RowReader", "Schema", "Turn", "detect_schema", "register_schema"]
