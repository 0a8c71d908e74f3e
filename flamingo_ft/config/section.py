"""What every section of a recipe is: strict, frozen, its keys documented where they stand."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

LAX = Field(strict=False)  # YAML has text where Python has paths, and lists where a frozen recipe has tuples
Count = Annotated[int, Field(ge=1)]


class PathKind(Enum):
    """What the path of a key is for; decides where a relative one starts (`flamingo_ft.config.paths`)."""

    OUTPUT = "written by the run"
    SHARED = "written by the run and read by later ones"
    INPUT = "read"
    TOWER = "a vision tower"
    WEIGHTS = "the weights of a vision tower"
    LANGUAGE = "a language model"
    START = "a model to start from"


FilePath = Annotated[Path, LAX, PathKind.OUTPUT]  # what a run writes, relative to the current directory
SharedPath = Annotated[Path, LAX, PathKind.SHARED]
InputPath = Annotated[Path, LAX, PathKind.INPUT]
TowerName = Annotated[str, PathKind.TOWER]
WeightsName = Annotated[str, PathKind.WEIGHTS]
LanguageName = Annotated[str, PathKind.LANGUAGE]
StartPath = Annotated[Path, LAX, PathKind.START]
Names = Annotated[
    tuple[str, ...],
    LAX,
    Field(min_length=1),
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]


QuantizationFormat = Literal["none", "int8", "nf4", "fp4"]
ComputeDtype = Literal["auto", "fp32", "bf16", "fp16"]


class Section(BaseModel):
    """A mapping of a recipe."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, may be, or is a list of."""
    inside = get_args(annotation) or (annotation,)
    return next((one for one in inside if isinstance(one, type) and issubclass(one, BaseModel)), None)
