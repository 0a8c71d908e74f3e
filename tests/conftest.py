import gc
import shutil

import pytest
import torch
from transformers import PreTrainedConfig

from flamingo_ft.backbones import precision
from flamingo_ft.report import page
from flamingo_ft.training import train

from . import hub_server, regimes

# Tiny models gain nothing from a second thread, and on a busy machine threads that wait for each other cost
# minutes.
torch.set_num_threads(1)

WHOLE_RUN = (page, "save_figures", page.save_figures), (train, "memory_notice", train.memory_notice)


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection.

    Every training run and merge collects garbage several times, and searching the imported modules each time
    took a fifth of the suite's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def lean_runs():
    """Let runs draw no figures and plan no memory: both take longer than a tiny run itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "save_figures", lambda run: {})
        patch.setattr(train, "memory_notice", lambda recipe: "memory: not planned (a test)")
        yield


@pytest.fixture(scope="session", autouse=True)
def short_names_of_configurations():
    """Let transformers format no configuration that it reads, for a log message that nobody sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedConfig, "__repr__", object.__repr__)
        yield


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """Compute in float32 on every processor where a test does not name a dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def whole_runs():
    """Let them do both nevertheless."""
    with pytest.MonkeyPatch.context() as patch:
        for part in WHOLE_RUN:
            patch.setattr(*part)
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
