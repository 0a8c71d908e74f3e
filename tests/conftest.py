import gc
import shutil

import pytest
import torch

from flamingo_ft.report import page

from . import hub_server, regimes

# Tiny models gain nothing from a second thread, and on a busy machine threads that wait for each other cost
# minutes.
torch.set_num_threads(1)

draw_figures = page.save_figures


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection.

    Every training run and merge collects garbage several times, and searching the imported modules each time
    took a fifth of the suite's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Leave the figures out of the report of every run: they take longer than a tiny training run itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "save_figures", lambda run: {})
        yield


@pytest.fixture(scope="module")
def figures():
    """Draw the figures nevertheless."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "save_figures", draw_figures)
        yield


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
