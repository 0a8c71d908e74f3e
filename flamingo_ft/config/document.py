"""YAML text -> plain values that remember the line they stand on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from flamingo_ft.errors import UserError

Location = tuple[str | int, ...]  # the keys and list indices that lead to a value


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's scalars: `1e-4` is a number; `on`, `12:30` and dates are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def scan_tag(self) -> None:
        raise yaml.scanner.ScannerError(None, None, "found a tag; a recipe has none", self.get_mark())


_SCALARS = (  # tag, what it looks like, first characters ("" stands for an empty value)
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9]([0-9_]*[0-9])?)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
)
for _tag, _pattern, _first in _SCALARS:
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Document:
    """Values of one YAML text, and the nodes they were made from."""

    name: str
    """What the text is called in error messages: a file's path, or the override itself."""
    values: Any
    root: yaml.Node | None

    def find(self, location: Location) -> tuple[int, bool]:
        """The line (from 1) of `location` and True, or the line of the deepest part there is and False."""
        line, node = _line(self.root), self.root
        for step in location:
            child = _child(node, step)
            if child is None:
                return line, False
            line, node = child
        return line, True


def parse(text: str, name: str) -> Document:
    """Read YAML strictly.

    Raises UserError, with the line, for text that is not YAML, a key given twice and a key that is not text.
    """
    try:
        loader = RecipeLoader(text)
        root = loader.get_single_node()
        _check_keys(root, name)
        values = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context
        raise UserError(f"{name}:{mark.line + 1}: not valid YAML: {problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: not valid YAML: {error.reason}; remove the character") from error
    return Document(name, values, root)


def _line(node: yaml.Node | None) -> int:
    return 1 if node is None else node.start_mark.line + 1


def _child(node: yaml.Node | None, step: str | int) -> tuple[int, yaml.Node] | None:
    """Line and node that `step` leads to from `node`: a key's own line, or where a list's entry begins."""
    if isinstance(node, yaml.MappingNode):
        # Keys merged from an anchor are put before the mapping's own, and the last one counts.
        for key, value in reversed(node.value):
            if key.value == step:
                return _line(key), value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and 0 <= step < len(node.value):
        return _line(node.value[step]), node.value[step]
    return None


def _mappings(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Every mapping below `root`, each once: an alias leads back to a node that was seen."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            waiting.extend(value for _, value in node.value)
        else:
            waiting.extend(node.value)


def _check_keys(root: yaml.Node | None, name: str) -> None:
    for mapping in _mappings(root):
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise UserError(f"{name}:{_line(key)}: found {_shown(key)} as a key; keys are text")
            if key.value in lines:
                first = lines[key.value]
                message = f"{key.value}: given twice, first on line {first}; keep one"
                raise UserError(f"{name}:{_line(key)}: {message}")
            lines[key.value] = _line(key)


def _shown(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
