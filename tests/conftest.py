import shutil

import pytest
import torch

from . import regimes

# Tiny models gain nothing from a second thread, and threads that wait for each other on a busy machine cost minutes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained_start(tmp_path_factory):
    """A folder with a small recipe, its data, and in `start` an adapter to start from, made once."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        regimes.write_run(folder)
        regimes.write_start(folder / "start")
    return folder


@pytest.fixture
def small_run(trained_start, tmp_path, monkeypatch):
    """A current directory with a copy of it."""
    shutil.copytree(trained_start, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
