"""The start of a notebook: where its runs are kept, and recipes that a test replaces by their trials."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from flamingo_ft.config import load_recipe
from flamingo_ft.errors import UserError
from flamingo_ft.notebook import start, start_notebook, write_recipe

HUB = {"model.language.name": "org/name", "data": {"train": [{"hub": "org/data"}]}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    for name in ("TERM", "COLUMNS", "LINES"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("SMOKE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_kept_in_the_current_directory():
    assert start_notebook("mine") == Path("runs/mine") and Path("runs/mine").is_dir()


def test_on_colab_runs_are_kept_on_the_mounted_drive(here, monkeypatch):
    mounted = []
    colab = ModuleType("google.colab")
    colab.drive = SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(start, "DRIVE", here / "drive")
    assert start_notebook("mine") == here / "drive" / "MyDrive" / "flamingo_ft" / "mine"
    assert mounted == [str(here / "drive")]


def test_a_test_leaves_nothing_in_the_current_directory(here, monkeypatch):
    monkeypatch.setenv("SMOKE", "1")
    monkeypatch.setattr(start.tempfile, "tempdir", str(here.parent))
    assert start_notebook("mine").parent == here.parent and not list(here.iterdir())


def test_commands_of_a_notebook_have_no_bars_and_wide_tables():
    start_notebook("mine")
    console = Console(force_terminal=True, _environ=dict(os.environ))
    assert not console.is_interactive and console.color_system is None
    assert console.width == start.COLUMNS


def test_a_recipe_is_written_with_its_changes_and_its_run_beside_it(here):
    data = here / "mine.jsonl"
    data.touch()
    changes = {"train.max_steps": 7, "data": {"train": [{"path": data}]}, "lora.language": {"r": 4}}
    file = write_recipe(here / "mine.yaml", "quickstart", changes)
    recipe = load_recipe(file)
    assert recipe.train.max_steps == 7 and recipe.lora.parts["language"].r == 4
    assert recipe.data.train[0].path == data and recipe.data.eval == ()
    assert recipe.train.output_dir == here / "mine" and recipe.train.save_steps == start.SAVE_STEPS


def test_in_a_test_the_file_holds_a_trial_of_the_recipe(here, monkeypatch, capsys):
    monkeypatch.setenv("SMOKE", "1")
    recipe = load_recipe(write_recipe(here / "mine.yaml", "quickstart", HUB))
    assert recipe.model.language.name == "nano" and recipe.data.train[0].hub is None
    assert recipe.train.max_steps == start.SMOKE_STEPS and recipe.train.logging_steps == 1
    assert recipe.train.output_dir.parent == here / "mine"
    printed = capsys.readouterr().out
    assert "SMOKE=1: 6 steps and 4 held-out samples per source" in printed
    assert "model.language.name org/name: replaced by nano" in printed


def test_a_wrong_key_is_refused(here):
    with pytest.raises(UserError, match="max_stepz"):
        write_recipe(here / "mine.yaml", "quickstart", {"train.max_stepz": 7})
