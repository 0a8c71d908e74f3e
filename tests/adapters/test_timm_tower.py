"""Adapters on a timm tower: trained, saved, loaded again, merged, and with the tower in a moved folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from flamingo_ft import FlamingoForConditionalGeneration, cli
from flamingo_ft.adapters import load_adapter, save_adapter
from flamingo_ft.errors import UserError

from ..backbones.test_timm_tower import write_model
from ..hub_folders import put
from ..regimes import LORA, build, logits, shake

NAME = "timm/vit_small_patch16_dinov3.lvd1689m"
ON_HUB = "model.vision.name=timm/vit_small_patch16_dinov3"  # without the tag
LORA_ON_TOWER = (LORA, "lora.vision={r: 2, target_modules: [qkv, fc1]}")


@pytest.fixture
def run(hub, small_run) -> Path:
    """A folder with a small recipe, and a small DINOv3 with its released name on the local Hub."""
    write_model(small_run / "dinov3", "dinov3")
    put(hub, NAME, small_run / "dinov3")
    return small_run


def vision_record(adapter: str) -> dict:
    return json.loads(Path(adapter, "config.json").read_text())["backbones"]["vision"]


def test_a_trained_adapter_loads_its_tower_by_tag_and_commit(run, hub):
    assert cli.main(["train", "recipe.yaml", ON_HUB, "data.cache={folder: tokens}"]) == 0
    record = vision_record("run")
    assert record["name"] == NAME and record["revision"] == hub.repositories[NAME].history[-1].oid
    assert NAME in Path("run/README.md").read_text()
    expected = logits(*load_adapter("run"))
    write_model(run / "other", "dinov3", seed=1)
    put(hub, NAME, run / "other")
    assert torch.equal(logits(*load_adapter("run")), expected)
    assert cli.main(["plan", "recipe.yaml", ON_HUB]) == 0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora_on_a_timm_tower_is_saved_and_loaded(quantization, run):
    model, processor = build(ON_HUB, *LORA_ON_TOWER, f"model.vision.quantization={quantization}")
    shake(model, 0.2)
    save_adapter(model, processor, Path("adapter"))
    assert torch.equal(logits(*load_adapter("adapter")), logits(model, processor))


def test_a_merged_model_with_a_timm_tower_gives_the_adapters_logits(run):
    model, processor = build(ON_HUB, *LORA_ON_TOWER)
    shake(model, 0.2)
    save_adapter(model, processor, Path("adapter"))
    assert cli.main(["merge", "adapter", "merged", "--dtype", "fp32"]) == 0
    merged = FlamingoForConditionalGeneration.from_pretrained("merged")
    torch.testing.assert_close(logits(merged, processor), logits(model, processor), atol=1e-4, rtol=1e-4)


def test_a_moved_folder_of_a_timm_tower_is_found_beside_the_adapter(run):
    model, processor = build("model.vision.name=./dinov3")
    shake(model, 0.2)
    save_adapter(model, processor, Path("runs/adapter"))
    assert vision_record("runs/adapter")["name"] == str(run / "dinov3")
    shutil.move("dinov3", "runs/dinov3")
    assert torch.equal(logits(*load_adapter("runs/adapter")), logits(model, processor))
    shutil.rmtree("runs/dinov3")
    write_model(run / "runs" / "dinov3", "dinov3", seed=1)
    with pytest.raises(UserError, match="vision"):
        load_adapter("runs/adapter")
