"""Data flows one way: each folder imports only folders above it, and only `backbones` imports the engines."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flamingo_ft

PACKAGE = Path(flamingo_ft.__file__).parent
ORDER = (
    "errors",
    "version",
    "formatting",
    "templates",
    "atomic",
    "machine_errors",
    "progress",
    "processes",
    "hub",
    "config",
    "formats",
    "backbones",
    "model",
    "data",
    "adapters",
    "registration",  # called from flamingo_ft/__init__ alone: it imports what it registers
    "convert",
    "inference",
    "evaluation",
    "publish",
    "check",
    "plan",
    "report",
    "training",
    "notebook",
    "cli",
    "__main__",
)
APART = ("check", "plan", "report")  # none of them imports another
ONLY_IN_BACKBONES = {"open_clip", "timm", "bitsandbytes"}


def imports(source: str, package: str) -> Iterator[tuple[str, list[str]]]:
    """Module and names of every import in a file of `package`, relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*above, *filter(None, [node.module])]), [alias.name for alias in node.names]


def places(source: str, package: str) -> Iterator[str]:
    """The parts of flamingo_ft that a file imports from: `backbones`, `config`, ..."""
    for module, names in imports(source, package):
        root, *inside = module.split(".")
        if root == "flamingo_ft":
            yield from inside[:1] or names or ["the whole package"]


def violations(place: str, source: str, package: str) -> list[str]:
    """What a file in `place` imports against the order."""
    allowed = {*ORDER[: ORDER.index(place) + 1]}
    if place in APART:
        allowed -= {*APART} - {place}
    elif place == "training":
        allowed -= {"check"}
    wrong = [f"{place} imports {used}" for used in places(source, package) if used not in allowed]
    foreign = {module.split(".")[0] for module, _ in imports(source, package)} & ONLY_IN_BACKBONES
    return wrong + [f"{place} imports {engine}" for engine in sorted(foreign) if place != "backbones"]


def files() -> list[tuple[str, Path]]:
    """Every file of the package except its top `__init__.py`, with its place in the order."""
    placed = (
        (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")
    )
    return [(place, path) for place, path in placed if path != PACKAGE / "__init__.py"]


def test_every_part_of_the_package_has_a_place_in_the_order():
    assert {place for place, _ in files()} <= {*ORDER}


def test_a_folder_imports_only_folders_above_it_and_only_backbones_imports_the_engines():
    wrong = []
    for place, path in files():
        package = ".".join(["flamingo_ft", *path.relative_to(PACKAGE).parts[:-1]])
        wrong += [
            f"{path}: {message}" for message in violations(place, path.read_text(encoding="utf-8"), package)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "place, source",
    [
        ("model", "import flamingo_ft.training.train"),
        ("model", "from flamingo_ft import data"),
        ("model", "from flamingo_ft import FlamingoProcessor"),
        ("model", "import flamingo_ft"),
        ("model", "from ..adapters.save import save"),
        ("model", "from .. import adapters"),
        ("model", "def f():\n    from flamingo_ft.data.batch import collate"),
        ("training", "from flamingo_ft.cli import main"),
        ("training", "import open_clip.model"),
        ("plan", "from flamingo_ft.check.check_report import CheckReport"),
        ("training", "from flamingo_ft.check import findings"),
        ("config", "from bitsandbytes import nn"),
    ],
)
def test_an_import_against_the_order_is_detected(place, source):
    assert violations(place, source, f"flamingo_ft.{place}")


@pytest.mark.parametrize(
    "place, source",
    [
        ("model", "from . import perceiver"),
        ("model", "from .perceiver import PerceiverResampler"),
        ("model", "from ..backbones import language"),
        ("model", "import torch, flamingo_ft.backbones.language"),
        ("cli", "from flamingo_ft import processes"),
        ("training", "from flamingo_ft.plan import plan_memory"),
        ("backbones", "import open_clip"),
        ("__main__", "from flamingo_ft.cli import main"),
    ],
)
def test_an_import_in_the_order_is_accepted(place, source):
    assert not violations(place, source, f"flamingo_ft.{place}")


# --- cycles ---


def module_name(path: Path) -> str:
    parts = ["flamingo_ft", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> str:
    return ".".join(["flamingo_ft", *path.relative_to(PACKAGE).parts[:-1]])


def import_graph(sources: dict[str, tuple[str, str]]) -> dict[str, set[str]]:
    """Module -> modules that it imports, in functions and for the type checker too.

    sources: module -> its source and its package.
    """
    graph = {}
    for name, (source, package) in sources.items():
        imported_modules = set()
        for module, names in imports(source, package):
            for imported in names or [""]:
                whole = f"{module}.{imported}"
                imported_modules.add(whole if whole in sources else module)
        graph[name] = {module for module in imported_modules if module in sources} - {name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that import each other, directly or through others."""
    reachable: dict[str, set[str]] = {}
    for start in graph:
        seen, stack = set(), [start]
        while stack:
            for module in graph[stack.pop()] - seen:
                seen.add(module)
                stack.append(module)
        reachable[start] = seen
    groups = {
        frozenset(other for other in reachable[start] if start in reachable[other])
        for start in graph
        if start in reachable[start]
    }
    return sorted((set(group) for group in groups), key=sorted)


def test_no_modules_import_each_other():
    sources = {
        module_name(path): (path.read_text(encoding="utf-8"), package_of(path))
        for path in PACKAGE.rglob("*.py")
    }
    groups = cycles(import_graph(sources))
    assert not groups, "\n".join(", ".join(sorted(group)) for group in groups)


@pytest.mark.parametrize(
    "first, second",
    [
        ("from flamingo_ft.b import x", "import flamingo_ft.a"),
        ("from . import b", "def f():\n    from .a import y"),
        ("from flamingo_ft import b", "if True:\n    from flamingo_ft.a import y"),
    ],
)
def test_a_cycle_is_detected(first, second):
    sources = {"flamingo_ft.a": (first, "flamingo_ft"), "flamingo_ft.b": (second, "flamingo_ft")}
    assert cycles(import_graph(sources)) == [{"flamingo_ft.a", "flamingo_ft.b"}]


# --- imports by string ---

IMPORT_BY_STRING = {
    "__init__.py": "the package's own public names, on first use",
    "cli/environment_probe.py": "each dependency in turn, to report those that cannot be imported",
}


def string_imports(source: str) -> list[str]:
    """Calls that import a module by its name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in calls
    ]
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call, name in zip(calls, names, strict=True)
        if name in ("import_module", "__import__")
    ]


def test_no_module_is_imported_by_its_name():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)) not in IMPORT_BY_STRING:
            wrong += [f"{path}: {call}" for call in string_imports(path.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", ["import_module('x')", "importlib.import_module(NAME)", "__import__('x')"])
def test_an_import_by_name_is_detected(source):
    assert string_imports(source)
