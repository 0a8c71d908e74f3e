"""Import checkpoints of other Flamingos, and export adapters and models in their formats."""

from .exporter import export_open_flamingo, export_otter
from .importer import Conversion, import_checkpoint
from .matching_model import Backbones

__all__ = ["Backbones", "Conversion", "export_open_flamingo", "export_otter", "import_checkpoint"]
