"""The keys of a recipe as documentation: a list for the terminal, and a JSON schema for editors."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flamingo_ft.config.schema import Recipe
from flamingo_ft.errors import UserError

from .library import SCHEMA_FILE

MODELINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
"""The comment that points an editor to the schema beside a recipe."""

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class RecipeKey:
    """One key. name: dotted, a list's entry by its index, as in overrides; default: as YAML, None if required."""

    name: str
    type: str
    default: str | None
    description: str
    is_section: bool


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, generated from its declaration."""
    schema = _tidy(Recipe.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The content of `SCHEMA_FILE`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def recipe_keys(prefix: str | None = None) -> list[RecipeKey]:
    """Every key in the order of declaration, or those at and below ``prefix``.

    Raises UserError for a prefix that no key has, with the nearest keys.
    """
    schema = json_schema()
    keys = list(_keys(schema, schema["$defs"], ""))
    if prefix is None:
        return keys
    requested = ".".join("0" if step.isdecimal() else step for step in prefix.strip(".").split("."))
    found = [key for key in keys if f"{key.name}.".startswith(f"{requested}.")]
    if not found:
        raise UserError(
            f"recipes keys: no key {prefix}; {_suggestion(requested, [key.name for key in keys])}"
        )
    return found


def _suggestion(requested: str, names: list[str]) -> str:
    last = next((step for step in reversed(requested.split(".")) if not step.isdecimal()), requested)
    near = [name for name in names if name.rpartition(".")[2] == last] or [
        name for name in names if last in name
    ]
    near = near or difflib.get_close_matches(requested, names, n=3)
    ends = {name.rpartition(".")[2]: name for name in names}
    near = near or [ends[end] for end in difflib.get_close_matches(last, ends, n=3)]
    if near:
        return f"did you mean {' or '.join(near[:4])}?"
    return f"a recipe has the sections {', '.join(name for name in names if '.' not in name)}"


def _keys(section: Mapping[str, Any], definitions: Mapping[str, Any], parent: str) -> Iterator[RecipeKey]:
    for name, declared in section["properties"].items():
        here, inner = f"{parent}{name}", _section(declared, definitions)
        is_list = declared.get("type") == "array"
        default = (
            None
            if name in section.get("required", ())
            else _yaml(declared.get("default"), is_list or not inner)
        )
        description = declared.get("description") or (inner or {}).get("description", "")
        yield RecipeKey(here, _type(declared, definitions), default, description, inner is not None)
        if inner:
            yield from _keys(inner, definitions, f"{here}.0." if is_list else f"{here}.")


def _section(declared: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a key is, may be, or is a list of."""
    options = [declared, declared.get("items", {}), *declared.get("anyOf", ())]
    name = next((option["$ref"] for option in options if "$ref" in option), None)
    return definitions[name.rpartition("/")[2]] if name else None


def _type(declared: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A type in words, such as `integer >= 1`, `none | int8 | nf4 | fp4` or `list of section`."""
    if "anyOf" in declared:
        return " or ".join(_type(option, definitions) for option in declared["anyOf"])
    if "$ref" in declared:
        return "section"
    if "enum" in declared:
        return " | ".join(map(str, declared["enum"]))
    if "const" in declared:
        return str(declared["const"])
    kind = declared["type"]
    if kind == "array":
        return f"list of {_type(declared['items'], definitions)}"
    if kind == "object":
        return "mapping of text to text"
    names = {"boolean": "true | false", "string": "path" if declared.get("format") == "path" else "text"}
    bounds = [f"{sign} {declared[bound]:g}" for bound, sign in _BOUNDS.items() if bound in declared]
    return " ".join([names.get(kind, kind), " and ".join(bounds)]).strip()


def _yaml(default: Any, is_value: bool) -> str:
    """A default as it would be written in a recipe; of a section, its keys' own."""
    if default is None or not is_value:
        return "null" if default is None else "see its keys"
    return default if isinstance(default, str) else json.dumps(default)


def _tidy(schema: Any) -> Any:
    """The schema without generated titles, and descriptions on one line each."""
    if isinstance(schema, list):
        return [_tidy(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: _tidy(one) for name, one in schema.items() if name != "title" or not isinstance(one, str)}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    return kept
