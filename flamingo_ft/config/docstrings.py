"""Documentation of the keys of a section: the docstrings below them, read from the source when asked for.

pydantic's ``use_attribute_docstrings`` reads them when a class is created, and searches all imported modules
for its source, which took more than a second of CPU time at every start.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from itertools import pairwise


def attribute_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring of each attribute that a class or one of its bases declares with one."""
    documented: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        documented |= _module_docstrings(base.__module__).get(base.__qualname__, {})
    return documented


@cache
def _module_docstrings(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of the attributes of each class of a module; none for one without source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {node.name: _class_docstrings(node) for node in tree.body if isinstance(node, ast.ClassDef)}


def _class_docstrings(node: ast.ClassDef) -> dict[str, str]:
    return {
        declared.target.id: inspect.cleandoc(below.value.value)
        for declared, below in pairwise(node.body)
        if isinstance(declared, ast.AnnAssign)
        and isinstance(declared.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
