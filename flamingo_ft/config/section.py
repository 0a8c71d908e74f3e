"""The base class of a recipe's sections, and the types that their keys share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    create_model,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError

from flamingo_ft.config.docstrings import attribute_docstrings


class Section(BaseModel):
    """A section (mapping) of a recipe: strict, frozen, without unknown keys.

    Docstrings of its keys are their documentation.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the section's JSON schema, with the documentation of its keys."""
        schema = handler(core_schema)
        keys = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in attribute_docstrings(cls).items():
            if name in keys:
                keys[name].setdefault("description", text)
        return schema


class PathKind(Enum):
    """What a path is used for.

    It decides the folder that a relative path starts from (`flamingo_ft.config.paths`).
    """

    OUTPUT = "written by the run"
    SHARED = "written by the run and read by later ones"
    INPUT = "data"
    TOWER = "vision tower"
    WEIGHTS = "weights of a vision tower"
    LANGUAGE = "language model"
    START = "model to initialize from"
    METRIC = "a user's metric"


LAX = Field(strict=False)  # YAML has text where Python has paths, and lists where a frozen recipe has tuples
Count = Annotated[int, Field(ge=1)]

OutputPath = Annotated[Path, LAX, PathKind.OUTPUT]
SharedPath = Annotated[Path, LAX, PathKind.SHARED]
InputPath = Annotated[Path, LAX, PathKind.INPUT]
StartPath = Annotated[Path, LAX, PathKind.START]
TowerName = Annotated[str, PathKind.TOWER]
WeightsName = Annotated[str, PathKind.WEIGHTS]
LanguageName = Annotated[str, PathKind.LANGUAGE]

ModuleNames = Annotated[  # a list of names, or one name
    tuple[str, ...],
    LAX,
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]

QuantizationFormat = Literal["none", "int8", "nf4", "fp4"]
ComputeDtype = Literal["auto", "fp32", "bf16", "fp16"]

S = TypeVar("S", bound=Section)


def with_keys(keys: dict[str, Any]) -> Callable[[type[S]], type[S]]:
    """Return a class decorator that adds ``keys``, {name: (type, Field)}, before a section's own keys."""

    def extend(section: type[S]) -> type[S]:
        first = create_model(f"{section.__name__}Keys", __base__=Section, **keys)
        names: dict[str, Any] = {"__doc__": section.__doc__, "__module__": section.__module__}
        return cast("type[S]", create_model(section.__name__, __base__=(section, first), **names))

    return extend


def one_of(names: Collection[str], *others: str) -> AfterValidator:
    """Return a validator that accepts ``others`` and a table's entries, also those added after import."""

    def check(name: str) -> str:
        if name in others or name in names:
            return name
        *known, last = map(repr, (*others, *names))
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(known)} or {last}"})

    return AfterValidator(check)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key's type is, is optionally, or is a list of; None for plain values."""
    inside = get_args(annotation) or (annotation,)
    return next((one for one in inside if isinstance(one, type) and issubclass(one, BaseModel)), None)
