"""Import checkpoints of other Flamingos, and export adapters and models in their formats."""

from .conversion import Backbones, Conversion
from .exporter import export_open_flamingo, export_otter
from .importer import import_checkpoint

__all__ = ["Backbones", "Conversion", "export_open_flamingo", "export_otter", "import_checkpoint"]
