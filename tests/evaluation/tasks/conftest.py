"""The hand-made files of each task, written once."""

import pytest

from .published import FILES


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Return the folder of each task's files."""
    root = tmp_path_factory.mktemp("published")
    for name, write in FILES.items():
        write(root / name)
    return {name: root / name for name in FILES}
