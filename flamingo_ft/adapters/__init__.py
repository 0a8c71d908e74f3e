"""Adapters: trainable parameters, LoRA, saving, loading and merging."""

from flamingo_ft.model import FlamingoForConditionalGeneration
from flamingo_ft.model.parts import trainable_parameters

from . import peft_import as peft_import  # before any other import of peft
from .card import write_card
from .check_start import check_start
from .composition import load_composition, load_from_folders, name_base, write_composition
from .init_from import init_bridge
from .load import load_adapter, load_base, load_trained, restore_trainable
from .lora import add_lora
from .merge import write_merged
from .multi_adapter import Adapters
from .save import save_adapter
from .trainable import prepare_training, set_trainable

FlamingoForConditionalGeneration.set_adapter_loader(load_from_folders)

__all__ = [
    "Adapters",
    "add_lora",
    "check_start",
    "init_bridge",
    "load_adapter",
    "load_base",
    "load_composition",
    "load_trained",
    "name_base",
    "prepare_training",
    "restore_trainable",
    "save_adapter",
    "set_trainable",
    "trainable_parameters",
    "write_card",
    "write_composition",
    "write_merged",
]
