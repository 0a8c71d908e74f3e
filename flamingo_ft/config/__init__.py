"""The recipe: one strict and typed YAML file that describes a run completely.

`recipe` declares it, one file per section; `load_recipe` reads a file, or a packaged recipe by its name.
"""

from flamingo_ft.config.data_section import AugmentationSection, CacheSection, DataSection, DataSource
from flamingo_ft.config.loading import (
    LOG_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    PROBE_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    dump_recipe,
    load_recipe,
)
from flamingo_ft.config.method_sections import DpoSection, GrpoSection, KtoSection
from flamingo_ft.config.method_warnings import method_warnings
from flamingo_ft.config.model_section import (
    RELEASED_PERCEIVER,
    CrossAttentionSection,
    LanguageSection,
    LoraPart,
    LoraSection,
    ModelSection,
    PerceiverSection,
    TrainableSection,
    VisionSection,
)
from flamingo_ft.config.recipe import Recipe
from flamingo_ft.config.stages import StageSection, stage_folder_name
from flamingo_ft.config.train_section import (
    DecaysSection,
    EvalSection,
    RatesSection,
    TrainSection,
)

__all__ = [
    "LOG_FILE",
    "METRICS_FILE",
    "PREDICTIONS_FILE",
    "PROBE_FILE",
    "RECIPE_FILE",
    "RELEASED_PERCEIVER",
    "RESULTS_FILE",
    "AugmentationSection",
    "CacheSection",
    "CrossAttentionSection",
    "DataSection",
    "DataSource",
    "DecaysSection",
    "DpoSection",
    "EvalSection",
    "GrpoSection",
    "KtoSection",
    "LanguageSection",
    "LoraPart",
    "LoraSection",
    "ModelSection",
    "PerceiverSection",
    "RatesSection",
    "Recipe",
    "StageSection",
    "TrainSection",
    "TrainableSection",
    "VisionSection",
    "dump_recipe",
    "load_recipe",
    "method_warnings",
    "stage_folder_name",
]
