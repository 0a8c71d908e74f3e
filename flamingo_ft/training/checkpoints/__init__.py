"""Checkpoints: written whole or not at all, checked when they are read, gone on from to the last bit."""

from .folders import (
    best_folder,
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
from .sharded import load_parts, save_parts

__all__ = [
    "best_folder",
    "Keeping",
    "TRAINING",
    "check_fits",
    "checkpoint_folder",
    "checkpoint_root",
    "checkpoints",
    "load_parts",
    "newest_good",
    "prepare_root",
    "read_manifest",
    "refuse_earlier",
    "restore",
    "save_checkpoint",
    "save_parts",
    "set_aside_after",
    "verify",
]
