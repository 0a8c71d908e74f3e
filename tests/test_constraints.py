"""recipes/constraints.txt has a version of every dependency, in the range that pyproject.toml allows."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from . import constraints

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXT = (ROOT / "recipes" / "constraints.txt").read_text(encoding="utf-8")


def pinned() -> dict[str, Version]:
    """Return the versions of the file by canonical name."""
    lines = [line.partition("==") for line in TEXT.splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, _, version in lines}


def direct() -> Iterator[Requirement]:
    """Yield the requirements of the package and of its extra `test`."""
    yield from map(Requirement, PROJECT["dependencies"])
    yield from map(Requirement, PROJECT["optional-dependencies"]["test"])


def test_every_direct_dependency_has_a_version_in_its_range():
    versions = pinned()
    missing = [r.name for r in direct() if canonicalize_name(r.name) not in versions]
    assert missing == []
    assert [str(r) for r in direct() if versions[canonicalize_name(r.name)] not in r.specifier] == []


def test_other_extras_are_in_their_range_where_they_have_a_version():
    versions = pinned()
    for extra, lines in PROJECT["optional-dependencies"].items():
        for requirement in map(Requirement, lines):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is None or version in requirement.specifier, (extra, requirement)


def test_one_file_serves_machines_with_and_without_a_gpu():
    assert not [name for name in pinned() if name.startswith(constraints.CUDA)]
    assert not [name for name, version in pinned().items() if version.local]


def test_the_file_was_made_with_the_oldest_python_of_the_package():
    made_with = TEXT.partition("Python ")[2].partition(":")[0]
    (oldest,) = SpecifierSet(PROJECT["requires-python"])
    assert made_with.startswith(f"{oldest.version}.")


class Installed:
    """Distributions by name, with the requirements of each."""

    def __init__(self, **requires: list[str]):
        self.requires_of = requires

    def __call__(self, name: str) -> object:
        return type(
            "Distribution", (), {"requires": self.requires_of[name], "name": name, "version": "1.5+cpu"}
        )


def test_requirements_are_followed_through_extras_and_markers(monkeypatch):
    installed = Installed(
        root=["a[x]>=1", 'b ; extra == "test"', 'never ; extra == "other"', 'never ; python_version < "3"'],
        a=['c ; extra == "x"', 'never ; extra == "y"'],
        b=["a"],
        c=["root"],
    )
    monkeypatch.setattr(constraints, "distribution", installed)
    assert constraints.closure("root") == {"a", "c"}
    assert constraints.closure("root", ["test"]) == {"a", "b", "c"}
    assert constraints.constraint("a") == "a==1.5"


def test_the_script_gives_the_versions_of_this_environment():
    lines = constraints.constraints().splitlines()
    assert f"Python {platform.python_version()}:" in lines[0]
    assert f"pytest=={pytest.__version__}" in lines
