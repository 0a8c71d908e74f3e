"""A run on rows with boxes: the model learns to say where a digit is, with and without tiles."""

from __future__ import annotations

import json

import pytest

from flamingo_ft import load_recipe, train
from tests.data.canvases import write_canvases

RECIPE = """\
model:
  vision: {name: nano}
  language: {name: nano}
  perceiver: null
  cross_attention: {heads: 4, dim_head: 32}
lora: {language: {r: 16, lora_alpha: 32}}
data: {train: [{path: train.jsonl}], eval: [{path: eval.jsonl}]}
train: {output_dir: run, max_steps: 90, batch_size: 8, learning_rate: 4.0e-3, num_workers: 0}
eval: {batch_size: 60, max_new_tokens: 24, before: false}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_canvases(tmp_path, "train", 600, seed=0)
    write_canvases(tmp_path, "eval", 60, seed=1)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("tiles", ["null", "{max: 4}"], ids=["whole", "tiles"])
def test_a_model_learns_where_a_digit_is(tiles, folder):
    record = train(load_recipe(folder / "recipe.yaml", [f"data.tiles={tiles}"]))["eval"]
    assert record["iou"] > record["iou_shuffled_images"] + 0.15
    assert record["iou_50"] > record["iou_50_majority"] + 0.15
    assert record["verdict"].startswith("reads the images")
    rows = [json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text().splitlines()]
    reference = json.loads((folder / "eval.jsonl").read_text().splitlines()[0])
    assert rows[0]["boxes"]["reference"] == [{"image": 0, "box": reference["boxes"][0]}]
    assert rows[0]["image_sizes"] == [[96, 96]]
