"""Checkpoints: written atomically, verified by hash when read, resumed from bit for bit."""

from .folders import (
    best_folder,
    checkpoint_folder,
    checkpoint_root,
    latest_valid,
    list_checkpoints,
    newest_checkpoint,
    prepare_checkpoint_root,
    quarantine_newer,
    refuse_existing_checkpoints,
)
from .manifest import read_manifest, verify, write_manifest
from .save_load import (
    TRAINER_FOLDER,
    CheckpointPolicy,
    check_compatible,
    load_sharded_optimizer,
    restore_checkpoint,
    save_checkpoint,
    save_sharded_optimizer,
)

__all__ = [
    "TRAINER_FOLDER",
    "CheckpointPolicy",
    "best_folder",
    "check_compatible",
    "checkpoint_folder",
    "checkpoint_root",
    "latest_valid",
    "list_checkpoints",
    "load_sharded_optimizer",
    "newest_checkpoint",
    "prepare_checkpoint_root",
    "quarantine_newer",
    "read_manifest",
    "refuse_existing_checkpoints",
    "restore_checkpoint",
    "save_checkpoint",
    "save_sharded_optimizer",
    "verify",
    "write_manifest",
]
