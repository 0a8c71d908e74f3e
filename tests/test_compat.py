"""Private names of other libraries occur only in `compat.py` files, and all of them exist.

An upgrade that removes one fails here, in a second and by name.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

import flamingo_ft

PACKAGE = Path(flamingo_ft.__file__).parent
COMPAT = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("compat.py")
)
BY_NAME = ("getattr", "setattr", "hasattr", "delattr")
DOCUMENTED = {"_exit"}  # os._exit


@pytest.mark.parametrize("module", COMPAT)
def test_the_private_names_of_other_libraries_exist(module):
    import_module(module)


def test_compat_files_are_collected():
    assert "flamingo_ft.plan.compat" in COMPAT


def is_private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and name.strip("_") != "" and not dunder and name not in DOCUMENTED


def is_own(node: ast.expr) -> bool:
    """Whether an object is `self`, `cls` or `super()`, whose private names may be used and overridden."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined_names(tree: ast.Module) -> set[str]:
    """Names that a file defines: functions, classes, variables, fields, attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            names.add(node.attr)
    return names


def foreign_names(node: ast.AST, defined: set[str]) -> list[str]:
    """Names of other libraries that a node imports, or reads from an object."""
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")]
    if isinstance(node, ast.ImportFrom):
        module = (node.module or "").split(".")
        own = node.level or module[0] == "flamingo_ft"
        return [] if own else [*module, *(alias.name for alias in node.names)]
    if isinstance(node, ast.Attribute):
        return [] if is_own(node.value) or node.attr in defined else [node.attr]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
        target, name = node.args[:2]
        literal = isinstance(name, ast.Constant) and isinstance(name.value, str)
        return [name.value] if literal and not is_own(target) and name.value not in defined else []
    return []


def private_names(source: str) -> list[str]:
    """Private names of other libraries in a file, with their lines."""
    tree = ast.parse(source)
    defined = defined_names(tree)
    return [
        f"line {node.lineno}: {name}"
        for node in ast.walk(tree)
        for name in foreign_names(node, defined)
        if is_private(name)
    ]


def test_private_names_of_other_libraries_occur_only_in_compat_files():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "compat.py":
            wrong += [f"{path}: {name}" for name in private_names(path.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "from torch._subclasses.fake_tensor import FakeTensorMode",
        "from trl.trainer.utils import _CHUNK",
        "import torch._dynamo",
        "torch.ops.aten._flash(x)",
        "model._parameters",
        "def f(self):\n    self.model._tied",
        "getattr(model, '_tied')",
        "setattr(module, '_hook', None)",
    ],
)
def test_a_private_name_of_another_library_is_detected(source):
    assert private_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "from __future__ import annotations",
        "from flamingo_ft.plan._x import y",
        "from .x import _y",
        "self._x",
        "getattr(self, '_x')",
        "super()._x()",
        "x.__dict__",
        "class A:\n    def _f(self):\n        return other._f()",
        "class A(B):\n    def __init__(self):\n        self._x = 1\n        other._x",
    ],
)
def test_own_private_names_and_overriding_are_accepted(source):
    assert not private_names(source)
