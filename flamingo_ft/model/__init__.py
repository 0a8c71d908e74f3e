"""The Flamingo model: perceiver resampler, gated cross-attention, conditioning, and the two APIs."""

from .build import build_flamingo
from .configuration import FlamingoConfig
from .modeling import FlamingoForConditionalGeneration
from .open_flamingo import Flamingo, create_model_and_transforms
from .open_flamingo_checkpoints import LoadReport, load_open_flamingo
from .processor import FlamingoImageProcessor, FlamingoProcessor

__all__ = [
    "Flamingo",
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoImageProcessor",
    "FlamingoProcessor",
    "LoadReport",
    "build_flamingo",
    "create_model_and_transforms",
    "load_open_flamingo",
]
