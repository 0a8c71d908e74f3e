"""What trains, and how it is kept."""

from flamingo_ft.model import FlamingoForConditionalGeneration

from .card import write_card
from .check_start import check_start
from .composition import load_composition, load_from_folders, name_base, write_composition
from .init_from import init_bridge
from .load import load_adapter, load_base, load_trained, restore_trainable
from .lora import add_lora
from .merge import write_merged
from .multi_adapter import Adapters
from .prepare import prepare_training
from .save import save_adapter
from .trainable import set_trainable, trainable_parameters

FlamingoForConditionalGeneration.set_adapter_loader(load_from_folders)

__all__ = [
    "Adapters",
    "add_lora",
    "check_start",
    "load_adapter",
    "load_base",
    "load_composition",
    "load_trained",
    "name_base",
    "prepare_training",
    "restore_trainable",
    "save_adapter",
    "set_trainable",
    "init_bridge",
    "trainable_parameters",
    "write_card",
    "write_composition",
    "write_merged",
]
