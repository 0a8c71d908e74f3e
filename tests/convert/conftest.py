import pytest

from .backbones import FAMILIES, written


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """From a family to the names of its backbones."""
    root = tmp_path_factory.mktemp("backbones")
    return {family: written(root, family) for family in FAMILIES}
