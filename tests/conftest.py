import shutil

import huggingface_hub
import pytest
import torch
import transformers.utils.hub

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
    with hub_server.serving() as hub:
        values = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        values["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        values |= {"HF_HUB_CACHE": str(tmp_path / "hub_cache"), "HF_TOKEN_PATH": str(tmp_path / "no_token")}
        for name, value in values.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(
            huggingface_hub.hf_api.api, "endpoint", hub.url
        )  # PEFT's client, created on import
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # created on first use
        hub.constants = values
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
