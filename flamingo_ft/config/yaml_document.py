"""YAML text -> plain values, with the line that each of them is on; and values as text for a message.

ruamel.yaml records lines too, but would not be smaller: its scalars (hexadecimal numbers, dates), tags and
keys that are not text would have to be excluded just the same, and its containers and scalars converted to
plain ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from flamingo_ft.errors import UserError

Location = tuple[str | int, ...]  # the keys and list indices that lead to a value


def dotted(location: Location) -> str:
    """Return a location as users write it, on one line: `data.train.0.path`."""
    return " ".join(".".join(map(str, location)).split())


def yaml_line(values: Mapping[str, object]) -> str:
    """Return values as YAML on one line: `{max: 4, thumbnail: true}`."""
    return yaml.safe_dump(dict(values), default_flow_style=True, sort_keys=False, width=1000).strip()


_TAG = "tag:yaml.org,2002:"
_SCALARS = (  # tag, pattern, first characters ("" stands for an empty value)
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9]([0-9_]*[0-9])?)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
)


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2.

    `1e-4` is a number; `on`, `12:30` and dates are text. Escaped surrogate pairs are joined as in JSON.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def scan_tag(self) -> NoReturn:
        raise ScannerError(None, None, "got a tag; remove it", self.get_mark())

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        value = super().construct_scalar(node)
        try:
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            problem = "got half of a surrogate pair; write the character itself"
            raise ConstructorError(None, None, problem, node.start_mark) from None


for _name, _pattern, _first in _SCALARS:
    RecipeLoader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Document:
    """A parsed YAML text.

    name: what error messages call it, a file's path or an override. root: the YAML node of the values.
    """

    name: str
    values: Any
    root: yaml.Node | None

    def find(self, location: Location) -> tuple[int, bool]:
        """Return the line of ``location``, from 1, and whether it exists.

        If it does not, the line is that of its deepest existing parent.
        """
        line, node = _line(self.root), self.root
        for step in location:
            child = _child(node, step)
            if child is None:
                return line, False
            line, node = child
        return line, True


def parse(text: str, name: str) -> Document:
    """Parse YAML strictly.

    Raises UserError, with the line, for invalid YAML, a duplicate key and a key that is not text.
    """
    try:
        loader = RecipeLoader(text)
        root = loader.get_single_node()
        _check_keys(root, name)
        values = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise UserError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: not valid YAML: {error.reason}; remove the character") from error
    return Document(name, values, root)


def _line(node: yaml.Node | None) -> int:
    return 1 if node is None else node.start_mark.line + 1


def _child(node: yaml.Node | None, step: str | int) -> tuple[int, yaml.Node] | None:
    """Return the line and node of a mapping's value or a list's entry; None for a step that does not exist.

    The line of a mapping's value is that of its key.
    """
    if isinstance(node, yaml.MappingNode):
        # Keys merged from an anchor come before the mapping's own, and the last one counts.
        for key, value in reversed(node.value):
            if key.value == step:
                return _line(key), value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and 0 <= step < len(node.value):
        return _line(node.value[step]), node.value[step]
    return None


def _check_keys(root: yaml.Node | None, name: str) -> None:
    """Raise UserError for a key that is not text or occurs twice in a mapping."""
    for mapping in _mappings(root):
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            if key.tag == f"{_TAG}merge":
                continue
            if key.tag != f"{_TAG}str":
                text = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise UserError(f"{name}:{_line(key)}: got {text} as a key; keys have to be text")
            if key.value in lines:
                first = lines[key.value]
                raise UserError(
                    f"{name}:{_line(key)}: {key.value}: duplicate key, first on line {first}; keep one"
                )
            lines[key.value] = _line(key)


def _mappings(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """Yield every mapping under ``root`` once; an alias refers to a node that was visited before."""
    pending, visited = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in visited or not isinstance(node, yaml.CollectionNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            pending.extend(value for _, value in node.value)
        else:
            pending.extend(node.value)
