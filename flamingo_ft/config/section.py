"""What every section of a recipe is: strict, frozen, its keys documented where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

LAX = Field(strict=False)  # YAML has text where Python has paths, and lists where a frozen recipe has tuples
Count = Annotated[int, Field(ge=1)]
FilePath = Annotated[Path, LAX]
Names = Annotated[
    tuple[str, ...],
    LAX,
    Field(min_length=1),
    BeforeValidator(lambda v: (v,) if isinstance(v, str) else v),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


QuantizationFormat = Literal["none", "int8", "nf4", "fp4"]
ComputeDtype = Literal["auto", "fp32", "bf16", "fp16"]


class Section(BaseModel):
    """A mapping of a recipe."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
