"""Read checkpoints of other Flamingos without running their code, and map their keys to those used here."""

from .foreign_checkpoint import ForeignCheckpoint, parse_checkpoint, read_checkpoint

__all__ = ["ForeignCheckpoint", "parse_checkpoint", "read_checkpoint"]
