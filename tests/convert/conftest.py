import pytest

from .backbones import FAMILIES, written


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """The names of each family's backbones."""
    root = tmp_path_factory.mktemp("backbones")
    return {family: written(root, family) for family in FAMILIES}
