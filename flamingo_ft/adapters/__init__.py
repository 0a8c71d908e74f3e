"""What trains, and how it is kept."""

from .card import write_card
from .load import load_adapter
from .save import save_adapter
from .trainable import set_trainable, trainable_parameters

__all__ = ["load_adapter", "save_adapter", "set_trainable", "trainable_parameters", "write_card"]
