"""A run that starts from a model on the Hub is pinned to one commit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi

from flamingo_ft.adapters import load_adapter
from flamingo_ft.cli import main
from tests import regimes
from tests.hub_server import WRITER

START = "somebody/start"
COMMAND = [
    "train",
    "./recipe.yaml",
    *regimes.REGIMES["LoRA only"][:-1],
    f"model.init_from={START}",
    "train.max_steps=2",
]


@pytest.fixture
def commit(hub, small_run):
    """Move the start adapter to the Hub; return its commit."""
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.create_repo(START)
    api.upload_folder(repo_id=START, folder_path="start")
    shutil.rmtree("start")
    return hub.repositories[START].history[-1].oid


def move_on(hub) -> None:
    """Push another adapter under the same name."""
    regimes.write_start("other", "train.seed=7")
    HfApi(endpoint=hub.url, token=WRITER).upload_folder(repo_id=START, folder_path="other")


@pytest.mark.slow
def test_a_run_keeps_the_commit_of_init_from_that_it_started_with(commit, hub, small_run, capsys):
    assert main([*COMMAND, "train.save_steps=1"]) == 0
    record = json.loads((small_run / "run" / "config.json").read_text())["bridge_init"]
    assert record["path"] == f"{START}@{commit}"
    expected = regimes.logits(*load_adapter("run"))
    move_on(hub)
    assert torch.equal(regimes.logits(*load_adapter("run")), expected)
    (small_run / "run" / "metrics.json").unlink()
    shutil.rmtree(small_run / "run" / "checkpoints" / "step-2")
    assert main([*COMMAND, "train.save_steps=1", "--resume"]) == 0
    assert "resuming from run/checkpoints/step-1" in capsys.readouterr().err
    assert torch.equal(regimes.logits(*load_adapter("run")), expected)


@pytest.mark.slow
def test_resuming_with_another_init_from_is_refused(commit, hub, small_run, capsys):
    assert main([*COMMAND, "train.save_steps=1"]) == 0
    (small_run / "run" / "metrics.json").unlink()
    assert main([*COMMAND, "model.init_from=somebody/else", "--resume"]) == 2
    assert f"model.init_from was {START}@{commit}, is somebody/else" in capsys.readouterr().err


def test_a_missing_init_from_is_refused_before_loading(hub, small_run, monkeypatch, capsys):
    monkeypatch.setattr("flamingo_ft.training.train.open_data", None)
    assert main(COMMAND) == 2
    assert f"error: {START}: neither a local folder nor a visible Hub repository" in capsys.readouterr().err
    assert not any((small_run / "run").iterdir())
