"""The recipe: its six sections, whose values are validated one by one and then together."""

from __future__ import annotations

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from flamingo_ft.config.cross_field import cross_field_errors
from flamingo_ft.config.data_section import DataSection
from flamingo_ft.config.model_section import LoraSection, ModelSection, TrainableSection
from flamingo_ft.config.section import Section
from flamingo_ft.config.train_section import EvalSection, TrainSection

CROSS_FIELD = (
    "cross_field"  # pydantic's type of the error whose context holds all cross-field validation errors
)


class Recipe(Section):
    """Recipe of a flamingo_ft training run."""

    model: ModelSection
    """Both backbones and the bridge between them."""
    trainable: TrainableSection = TrainableSection()
    """Parts of the bridge that are trained in full."""
    lora: LoraSection = LoraSection()
    """LoRA on the backbones or on parts of the bridge."""
    data: DataSection
    """Training and evaluation data."""
    train: TrainSection
    """Training: length, optimization, checkpoints, logging."""
    eval: EvalSection = EvalSection()
    """Evaluation on the held-out samples."""

    @model_validator(mode="after")
    def _validate_cross_field(self) -> Recipe:
        errors = list(
            cross_field_errors(self.model, self.trainable, self.lora, self.data, self.train, self.eval)
        )
        if errors:
            text = "; ".join(f"{'.'.join(map(str, location))}: {message}" for location, message in errors)
            raise PydanticCustomError(CROSS_FIELD, "{text}", {"errors": errors, "text": text})
        return self
