"""Checkpoints as other Flamingos keep them: read, recognised by their keys, and brought under this package's names."""

from .recognise import Checkpoint, parse, read_checkpoint

__all__ = ["Checkpoint", "parse", "read_checkpoint"]
