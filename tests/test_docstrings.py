"""Every public name has a docstring, and `help(flamingo_ft)` lists the names of the package by purpose."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import flamingo_ft
from flamingo_ft import errors

PACKAGE = Path(flamingo_ft.__file__).parent
NAMES = sorted({*flamingo_ft.__all__} - {"__version__"})
LISTED = re.compile(r"^    (\w+) {2,}\S.*$", re.MULTILINE)
"""A name and its line in the docstring of the package."""
DOCUMENTED_ERROR = re.compile(r"\b(?:[A-Z]\w*Error|OutOfMemory|StoppedBySignal)\b")


def folders_with_names() -> list[str]:
    """Return the packages inside flamingo_ft whose `__init__` has an `__all__`."""
    files = [path for path in PACKAGE.rglob("__init__.py") if "\n__all__ = " in path.read_text("utf-8")]
    return [".".join(["flamingo_ft", *path.relative_to(PACKAGE).parts[:-1]]) for path in sorted(files)]


def members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines itself."""
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        is_documented_kind = inspect.isroutine(member) or isinstance(
            member, (property, classmethod, staticmethod)
        )
        if is_documented_kind and not name.startswith("_"):
            yield name, getattr(value, name)


def undocumented(module: Any) -> list[str]:
    """Return the classes, functions, methods and properties of a module's `__all__` without a docstring."""
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not value.__doc__ or value.__doc__.startswith(f"{name}("):  # a dataclass without one
            found.append(name)
        found += [f"{name}.{member}" for member, kind in members(value) if not inspect.getdoc(kind)]
    return found


def routines(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield a public function, or the methods of a public class, with their names."""
    value = getattr(flamingo_ft, name)
    if inspect.isclass(value):
        yield from ((f"{name}.{member}", kind) for member, kind in members(value) if inspect.isroutine(kind))
    else:
        yield name, value


def syntax_tree(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def raises_user_error(function: Callable[..., Any]) -> bool:
    """Whether the function's own body has `raise UserError(...)`."""
    raised = [node.exc for node in ast.walk(syntax_tree(function)) if isinstance(node, ast.Raise)]
    return any(isinstance(call, ast.Call) and ast.unparse(call.func) == "UserError" for call in raised)


def called(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield the functions of flamingo_ft that the function calls by a name of its module."""
    plain = inspect.unwrap(getattr(function, "__func__", function))
    for node in ast.walk(syntax_tree(function)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            value = getattr(plain, "__globals__", {}).get(node.func.id)
            if inspect.isfunction(value) and value.__module__.startswith("flamingo_ft."):
                yield value


def may_raise_user_error(function: Callable[..., Any]) -> bool:
    """Whether the function raises UserError, or a function that it calls does or documents that it does."""
    return raises_user_error(function) or any(
        raises_user_error(callee) or "UserError" in (callee.__doc__ or "") for callee in called(function)
    )


@pytest.mark.parametrize("module", ["flamingo_ft", *folders_with_names()])
def test_every_public_name_has_a_docstring(module):
    assert undocumented(import_module(module)) == []


def test_a_missing_docstring_is_detected():
    class Documented:
        """A class."""

        def method(self) -> None: ...

        @property
        def size(self) -> int: ...

    class module:
        __all__ = ["Documented", "routine"]
        routine = staticmethod(lambda: None)

    module.Documented = Documented
    assert undocumented(module) == ["Documented.method", "Documented.size", "routine"]


@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_may_raise_UserError_documents_it(name):
    documented = {
        full: inspect.getdoc(kind) or "" for full, kind in routines(name) if may_raise_user_error(kind)
    }
    assert [full for full, text in documented.items() if "UserError" not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_documented_error_exists(name):
    for full, kind in routines(name):
        for error in DOCUMENTED_ERROR.findall(inspect.getdoc(kind) or ""):
            known = getattr(errors, error, None) or getattr(builtins, error, None)
            assert known is not None and issubclass(known, BaseException), f"{full}: {error}"


def test_the_package_lists_each_of_its_names_once():
    assert sorted(LISTED.findall(flamingo_ft.__doc__)) == NAMES


def test_the_package_shows_its_names_without_importing_torch():
    code = "import sys, flamingo_ft; dir(flamingo_ft); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"
