"""The recipes with backbones of today train by name, on a local Hub with small models of these names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flamingo_ft import cli
from flamingo_ft.adapters import load_adapter
from flamingo_ft.config import load_recipe
from tests.hub_folders import put
from tests.regimes import write_run

from .published_models import MODELS, write_model
from .published_towers import TOWERS, put_in_small

RECIPES = ("siglip2_qwen3", "pe_core_smollm3")
FEW = ["train.max_steps=2", "train.warmup_steps=0", "train.batch_size=2", "train.num_workers=0",
       "data={train: [{path: train.jsonl}], eval: [{path: train.jsonl}]}", "eval.max_samples=1",
       "eval.max_new_tokens=2"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_plans_and_merges_by_name(name, hub, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_run(Path())
    section = load_recipe(name).model
    tower = next(one for one in TOWERS if one.name == section.vision.name)
    language = next(one for one in MODELS if one.name == section.language.name)
    put_in_small(tower, monkeypatch, hub, tmp_path / "tower")
    put(hub, language.name, write_model(tmp_path / "lm", language))

    assert cli.main(["plan", name, "--text-tokens", "16", "--images", "1"]) == 0
    assert cli.main(["train", name, *FEW]) == 0
    run = Path("runs", name)
    assert json.loads((run / "metrics.json").read_text())["train"]["steps"] == 2
    recorded = json.loads((run / "config.json").read_text())["backbones"]
    assert recorded["vision"]["name"] == tower.name and recorded["vision"]["pretrained"] == tower.pretrained
    assert recorded["language"]["name"] == language.name
    assert {record["quantization"]["format"] for record in recorded.values()} == {"nf4"}
    load_adapter(run)
    assert cli.main(["merge", str(run), "merged"]) == 0
