"""The Flamingo model: perceiver resampler, gated cross-attention, conditioning, and the two faces."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from .build import build_flamingo
from .configuration import FlamingoConfig
from .modeling import FlamingoForConditionalGeneration
from .open_flamingo import Flamingo, create_model_and_transforms
from .open_flamingo_checkpoints import LoadReport, load_open_flamingo
from .pipeline import register_pipeline
from .processor import FlamingoImageProcessor, FlamingoProcessor

AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig)
AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration)
AutoImageProcessor.register(FlamingoConfig, image_processor_classes={"torchvision": FlamingoImageProcessor})
AutoProcessor.register(FlamingoConfig, FlamingoProcessor)
register_pipeline()

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
