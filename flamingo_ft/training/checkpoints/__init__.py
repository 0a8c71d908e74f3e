"""Checkpoints: written whole or not at all, checked when they are read, gone on from to the last bit."""

from .folders import (
    checkpoint_folder,
    checkpoint_root,
    checkpoints,
    newest_good,
    prepare_root,
    refuse_earlier,
    set_aside_after,
)
from .load import check_fits, restore
from .manifest import read_manifest, verify
from .save import TRAINING, Keeping, save_checkpoint

__all__ = [
    "Keeping",
    "TRAINING",
    "check_fits",
    "checkpoint_folder",
    "checkpoint_root",
    "checkpoints",
    "newest_good",
    "prepare_root",
    "read_manifest",
    "refuse_earlier",
    "restore",
    "save_checkpoint",
    "set_aside_after",
    "verify",
]
