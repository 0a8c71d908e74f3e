"""Checkpoints of other Flamingos brought in, and adapters and models written for those."""

from .incoming import import_checkpoint
from .known import Backbones
from .outgoing import export_open_flamingo, export_otter
from .report import Conversion

__all__ = ["Backbones", "Conversion", "export_open_flamingo", "export_otter", "import_checkpoint"]
