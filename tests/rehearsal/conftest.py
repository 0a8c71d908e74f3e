from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from open_clip.factory import _MODEL_CONFIGS

from flamingo_ft.adapters.released_models import TOWER
from flamingo_ft.backbones import precision
from tests import hub_folders, hub_server
from tests.hub_server import Hub

from . import hub_contents


@pytest.fixture(scope="package")
def served(tmp_path_factory) -> Iterator[Hub]:
    """A Hub with the released models and two datasets, for `transformers`, OpenCLIP and `datasets`.

    As on a GPU, models compute in bfloat16.
    """
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch, hub_server.in_place_of_the_hub(patch, folder) as hub:
        patch.setitem(_MODEL_CONFIGS, TOWER[0], hub_folders.TOWER)
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(precision, "cpu_has_bf16", lambda: True)
        hub_server.shorten_waits(patch)
        hub_contents.fill(hub, folder / "files")
        yield hub


@pytest.fixture
def hub(served, tmp_path, monkeypatch) -> Hub:
    """The Hub, seen from a machine with an empty cache, no token, and an empty current directory."""
    new_machine(monkeypatch, tmp_path / "machine")
    served.requests.clear()
    served.failures.clear()
    return served


def new_machine(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Go to an empty folder, with empty caches and without a token."""
    (folder / "here").mkdir(parents=True)
    patch.chdir(folder / "here")
    empty_caches(patch, folder)
    patch.delenv("HF_TOKEN", raising=False)


def empty_caches(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Use caches in a new folder."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
