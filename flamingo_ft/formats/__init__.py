"""Checkpoints of other Flamingos: read without running their code, recognized by their keys, and mapped to the names used here."""

from .foreign_checkpoint import ForeignCheckpoint, parse_checkpoint, read_checkpoint

__all__ = ["ForeignCheckpoint", "parse_checkpoint", "read_checkpoint"]
