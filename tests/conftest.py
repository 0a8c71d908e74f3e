import shutil

import pytest
import torch

from . import hub_server, regimes

# Tiny models gain nothing from a second thread, and on a busy machine threads that wait for each other cost
# minutes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained_start(tmp_path_factory):
    """Return a folder with a small recipe, its data, and in `start` an adapter to start from."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        regimes.write_run(folder)
        regimes.write_start(folder / "start")
    return folder


@pytest.fixture
def small_run(trained_start, tmp_path, monkeypatch):
    """Copy `trained_start` to the current directory."""
    shutil.copytree(trained_start, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Run a local Hub server that the client uses in place of the real Hub; no token is set."""
    with hub_server.in_place_of_the_hub(monkeypatch, tmp_path) as hub:
        yield hub
