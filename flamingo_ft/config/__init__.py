"""The recipe: everything a run is made of, in one strict and typed YAML file.

`schema` declares the keys; `loading` reads a file, or a packaged recipe by its name, into a `Recipe`.
"""

from flamingo_ft.config.data import AugmentationSection, CacheSection, DataSection, DataSource
from flamingo_ft.config.loading import METRICS_FILE, RECIPE_FILE, dump_recipe, load_recipe
from flamingo_ft.config.schema import (
    CrossAttentionSection,
    LanguageSection,
    LoraPart,
    LoraSection,
    ModelSection,
    PerceiverSection,
    Recipe,
    TrainableSection,
    VisionSection,
)
from flamingo_ft.config.train import DecaysSection, DpoSection, EvalSection, RatesSection, TrainSection

__all__ = [
    "AugmentationSection",
    "CacheSection",
    "CrossAttentionSection",
    "DataSection",
    "DataSource",
    "DecaysSection",
    "DpoSection",
    "EvalSection",
    "LanguageSection",
    "LoraPart",
    "LoraSection",
    "ModelSection",
    "PerceiverSection",
    "RatesSection",
    "Recipe",
    "TrainSection",
    "TrainableSection",
    "VisionSection",
    "METRICS_FILE",
    "RECIPE_FILE",
    "dump_recipe",
    "load_recipe",
]
