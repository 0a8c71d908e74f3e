import pytest
import torch

from . import regimes

# Tiny models gain nothing from a second thread, and threads that wait for each other on a busy machine cost minutes.
torch.set_num_threads(1)


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A current directory with a small recipe, its data, and in `start` an adapter to start from."""
    monkeypatch.chdir(tmp_path)
    regimes.write_run(tmp_path)
    regimes.write_start(tmp_path / "start")
    return tmp_path
