"""What trains, and how it is kept."""

from .card import write_card
from .composition import load_composition, name_base, write_composition
from .load import load_adapter, load_base, load_trained
from .lora import add_lora
from .merge import write_merged
from .pairing import check_start
from .prepare import prepare_training
from .restore import restore_trainable
from .save import save_adapter
from .several import Adapters
from .start import start_bridge
from .trainable import set_trainable, trainable_parameters

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
    "start_bridge",
    "trainable_parameters",
    "write_card",
    "write_composition",
    "write_merged",
]
