"""Print the versions of all packages that flamingo_ft and its tests require here, as constraints of pip.

Run it where the tests have passed, with the oldest Python that the package supports: newer ones can install
the same versions.

    pip install -e '.[test]' && pytest
    python -m tests.constraints > recipes/constraints.txt
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# torch's CUDA builds require exact versions of these, each build others; its CPU builds require none.
CUDA = ("nvidia-", "cuda-", "triton")
HEADER = """\
# The versions with which the tests passed on Python {python}: pip install -e . -c recipes/constraints.txt
# Written by `python -m tests.constraints`. CUDA packages are left out: torch requires exact versions of them.
"""


def closure(root: str, extras: Iterable[str] = ()) -> set[str]:
    """Return the canonical names of the installed distributions that `root` requires, directly or not.

    extras: extras of `root`. Requirements of other platforms and Python versions are left out. Raises
    PackageNotFoundError if a required distribution is not installed.
    """
    pending = [(root, extra) for extra in ("", *extras)]
    seen: set[tuple[str, str]] = set()
    while pending:
        name, extra = pending.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                required = canonicalize_name(requirement.name)
                pending += [(required, other) for other in ("", *requirement.extras)]
    return {name for name, _ in seen} - {root}


def constraint(name: str) -> str:
    """Return the line of an installed distribution. The local part of its version (+cpu) is cut off."""
    installed = distribution(name)
    return f"{installed.name}=={Version(installed.version).public}"


def constraints() -> str:
    """Return the constraints of the current environment, sorted by name."""
    names = sorted(name for name in closure("flamingo_ft", ["test"]) if not name.startswith(CUDA))
    lines = [constraint(name) + "\n" for name in names]
    return HEADER.format(python=platform.python_version()) + "".join(lines)


if __name__ == "__main__":
    print(constraints(), end="")
