"""Documentation of a recipe's keys, from their declarations: for the terminal, for editors, and as a page."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flamingo_ft.config.data_section import DataSection
from flamingo_ft.config.library import SCHEMA_FILE, packaged_recipes, summary
from flamingo_ft.config.recipe import Recipe
from flamingo_ft.config.stages import COMMON_TRAIN_KEYS, STAGE_SECTIONS, STAGES, StageSection
from flamingo_ft.config.tables import METRIC_DESCRIPTIONS
from flamingo_ft.config.train_section import TrainSection
from flamingo_ft.errors import UserError
from flamingo_ft.formatting import one_line

MODELINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
"""The comment in a recipe that points editors to the schema beside it."""

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_SECTION_DEFAULT = "see its keys"
_MARKDOWN_HEAD = """\
# Recipes

A recipe is a YAML file that describes a run: model, data, training and evaluation. This page is generated
from the declarations of its keys (`flamingo-ft recipes keys --markdown > recipes/README.md`).
`flamingo-ft recipes keys PREFIX` prints the same in a terminal, and editors show it through
`recipe.schema.json`.

    flamingo-ft recipes new mine.yaml --data FILE     # write a recipe that fits your data
    flamingo-ft recipes copy NAME                     # or copy a packaged recipe and its data
    flamingo-ft train mine.yaml train.max_steps=100   # any key can be set here; values are YAML

On the command line, an entry of a list is addressed by its index: `data.train.0.weight=2`. What a recipe
reads is relative to the recipe file. What a run writes, and paths on the command line, are relative to the
current directory.
"""


@dataclass(frozen=True)
class RecipeKey:
    """A key of a recipe.

    name: dotted, entries of a list under index 0, as in overrides. default: as YAML; None for a required key.
    """

    name: str
    type: str
    default: str | None
    description: str
    is_section: bool

    @property
    def default_text(self) -> str:
        """The default in words."""
        if self.default is None:
            return "required"
        return "all keys optional" if self.default == _SECTION_DEFAULT else f"default {self.default}"


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe as it is written: what all stages give may be missing elsewhere."""
    schema = _declared_schema()
    data, train = (schema["$defs"][name] for name in (DataSection.__name__, TrainSection.__name__))
    complete = {"data": {"required": data.pop("required")}, "train": {"anyOf": train.pop("anyOf")}}
    schema["required"].remove("data")
    choice = [{"required": [STAGES]}, {"required": ["data"], "properties": complete}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "anyOf": choice}


def _declared_schema() -> dict[str, Any]:
    """Return the schema of the declarations, without what the sections of a stage repeat."""
    schema = _without_titles(Recipe.model_json_schema())
    stage = schema["$defs"][StageSection.__name__]
    stage["required"] = [key for key in stage["required"] if key not in STAGE_SECTIONS]
    for name in STAGE_SECTIONS:
        section = stage["properties"][name].pop("$ref")
        keys = schema["$defs"][section.rpartition("/")[2]]["properties"]
        varying = [key for key in keys if name != "train" or key not in COMMON_TRAIN_KEYS]
        stage["properties"][name] |= {
            "type": "object",
            "default": {},
            "additionalProperties": False,
            "properties": {key: {"$ref": f"{section}/properties/{key}"} for key in varying},
        }
    return schema


def schema_text() -> str:
    """Return the content of `SCHEMA_FILE`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def recipe_keys(prefix: str | None = None) -> list[RecipeKey]:
    """Return all keys in the order of declaration, or those at and below ``prefix``.

    Raises UserError, with the nearest keys, if no key has this prefix.
    """
    schema = _declared_schema()
    keys = list(_section_keys(schema, schema["$defs"], ""))
    if prefix is None:
        return keys
    requested = ".".join("0" if step.isdecimal() else step for step in prefix.strip(".").split("."))
    matching = [key for key in keys if f"{key.name}.".startswith(f"{requested}.")]
    if not matching:
        suggestion = _suggestion(requested, [key.name for key in keys])
        raise UserError(f"recipes keys: no key {prefix}; {suggestion}")
    return matching


def markdown() -> str:
    """Return recipes/README.md: the packaged recipes, a table of keys for each section, and the metrics."""
    recipes = _markdown_table(
        ("recipe", "what it does"),
        [(f"[{name}]({path.name})", summary(path)) for name, path in packaged_recipes().items()],
    )
    parts = [_MARKDOWN_HEAD, f"## Packaged recipes\n\n{recipes}"]
    keys = recipe_keys()
    for section in (key for key in keys if key.is_section):
        depth = "##" if "." not in section.name else "###"
        prefix = f"{section.name}.0." if section.type.startswith("list") else f"{section.name}."
        rows = [
            (f"`{key.name}`", _markdown_type(key), _markdown_default(key), key.description)
            for key in keys
            if key.name.startswith(prefix) and "." not in key.name.removeprefix(prefix)
        ]
        table = _markdown_table(("key", "type", "default", "what it does"), rows)
        parts.append(f"{depth} {section.name}\n\n{section.description}\n\n{table}")
    metrics = [(f"`{name}`", description) for name, description in METRIC_DESCRIPTIONS.items()]
    parts.append(f"## Metrics\n\n{_markdown_table(('metric', 'what it measures'), metrics)}")
    return "\n".join(parts)


def _section_keys(
    section: Mapping[str, Any], definitions: Mapping[str, Any], parent: str
) -> Iterator[RecipeKey]:
    """Yield the keys of a section's JSON schema and of the sections in it."""
    for name, schema in section["properties"].items():
        here, inner = f"{parent}{name}", _inner_section(schema, definitions)
        is_list = schema.get("type") == "array"
        is_required = name in section.get("required", ())
        default = None if is_required else _yaml_default(schema.get("default"), is_list or not inner)
        description = schema.get("description") or (inner or {}).get("description", "")
        yield RecipeKey(here, _type_text(schema), default, description, inner is not None)
        if inner:
            yield from _section_keys(inner, definitions, f"{here}.0." if is_list else f"{here}.")


def _inner_section(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the schema of the section that a key is, is optionally, or is a list of."""
    options = [schema, schema.get("items", {}), *schema.get("anyOf", ())]
    name = next((option["$ref"] for option in options if "$ref" in option), None)
    return definitions[name.rpartition("/")[2]] if name else None


def _type_text(schema: Mapping[str, Any]) -> str:
    """Return a type in words, such as `integer >= 1`, `none | int8 | nf4 | fp4` or `list of section`."""
    if "anyOf" in schema:
        return " or ".join(map(_type_text, schema["anyOf"]))
    if "$ref" in schema:
        return "section"
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema["type"]
    if kind == "array":
        return f"list of {_type_text(schema['items'])}"
    if kind == "object":
        return "section" if "properties" in schema else "mapping of text to text"
    names = {"boolean": "true | false", "string": schema.get("format", "text")}
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in _BOUNDS.items() if bound in schema]
    return " ".join([names.get(kind, kind), " and ".join(bounds)]).strip()


def _yaml_default(default: Any, is_value: bool) -> str:
    """Return a default as it would be written in a recipe. A section has no default of its own."""
    if default is None:
        return "null"
    if not is_value:
        return _SECTION_DEFAULT
    return default if isinstance(default, str) else json.dumps(default)


def _without_titles(schema: Any) -> Any:
    """Return the schema without pydantic's generated titles, each description on one line."""
    if isinstance(schema, list):
        return [_without_titles(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        name: _without_titles(one)
        for name, one in schema.items()
        if name != "title" or not isinstance(one, str)
    }
    if isinstance(kept.get("description"), str):
        kept["description"] = one_line(kept["description"])
    return kept


def _suggestion(requested: str, names: list[str]) -> str:
    """Return the nearest keys: with the same last component, its initials, containing it, or similar."""
    last = next((step for step in reversed(requested.split(".")) if not step.isdecimal()), requested)
    ends = {name.rpartition(".")[2]: name for name in names}
    nearest = (
        [name for name in names if name.rpartition(".")[2] == last]
        or [name for name in names if _initials(name.rpartition(".")[2]) == last]
        or [name for name in names if last in name]
        or difflib.get_close_matches(requested, names, n=3)
        or [ends[end] for end in difflib.get_close_matches(last, ends, n=3)]
    )
    if nearest:
        return f"did you mean {' or '.join(nearest[:4])}?"
    return f"a recipe has the sections {', '.join(name for name in names if '.' not in name)}"


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _markdown_type(key: RecipeKey) -> str:
    return "section" if key.is_section and not key.type.startswith("list") else key.type


def _markdown_default(key: RecipeKey) -> str:
    if key.default is None:
        return "**required**"
    return "" if key.default == _SECTION_DEFAULT else f"`{key.default}`"


def _markdown_table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
