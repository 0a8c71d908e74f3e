"""What every section of a recipe is: strict, frozen, its keys documented where they stand."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticKnownError

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


S = TypeVar("S", bound=Section)


def with_keys(keys: dict[str, Any]) -> Callable[[type[S]], type[S]]:
    """Return a class decorator that puts ``keys``, {name: (type, Field)}, in front of a section's own."""

    def extend(section: type[S]) -> type[S]:
        first = create_model(f"{section.__name__}Keys", __base__=Section, **keys)
        names = {"__doc__": section.__doc__, "__module__": section.__module__}
        return create_model(section.__name__, __base__=(section, first), **names)

    return extend


def one_of(names: Collection[str], *others: str) -> AfterValidator:
    """Return a validator for a name out of a table, which is looked up when a recipe is read: entries may be added.

    others: names that are not in the table and stand first.
    """

    def check(name: str) -> str:
        if name in others or name in names:
            return name
        *known, last = map(repr, (*others, *names))
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(known)} or {last}"})

    return AfterValidator(check)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, may be, or is a list of."""
    inside = get_args(annotation) or (annotation,)
    return next((one for one in inside if isinstance(one, type) and issubclass(one, BaseModel)), None)
