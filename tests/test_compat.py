"""Private names in `compat.py` files exist: an upgrade of a library that removes one is noticed by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import flamingo_ft

PACKAGE = Path(flamingo_ft.__file__).parent
COMPAT = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("compat.py")
)


@pytest.mark.parametrize("module", COMPAT)
def test_the_private_names_of_other_libraries_exist(module):
    import_module(module)


def test_there_are_compat_files():
    assert "flamingo_ft.plan.compat" in COMPAT
