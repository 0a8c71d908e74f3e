"""`train --smoke`: any recipe runs in seconds with stand-ins for what is not on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flamingo_ft import cli
from flamingo_ft.config import DataSource, load_recipe
from flamingo_ft.config.library import packaged_recipes
from flamingo_ft.config.tables import DATASET_FORMATS
from flamingo_ft.data import read_samples
from flamingo_ft.data.media import open_medium
from flamingo_ft.data.opened_data import open_data
from flamingo_ft.data.schemas.schema import detect_schema
from flamingo_ft.data.synthetic_rows import ROWS, write_synthetic_rows
from flamingo_ft.training.trial import Trial

FAST = ("siglip2_qwen3",)  # the others are tried with the slow tests
ON_HUB = {
    "model": {
        "vision": {"name": "ViT-L-14", "pretrained": "openai", "quantization": "nf4", "image_size": 336},
        "language": {"name": "org/language", "revision": "1" * 40, "quantization": "int8"},
        "cross_attn_every_n_layers": 8,
    },
    "lora": {"language": {"r": 4, "target_modules": ["Wqkv"]}},
    "data": {"train": [{"hub": "org/questions", "format": "vqa", "columns": {"answer": "target"}}]},
    "train": {"output_dir": "run", "epochs": 3, "batch_size": 64, "warmup_ratio": 0.1, "precision": "fp16"},
}


def write_recipe(values: dict, name: str = "recipe.yaml") -> Path:
    Path(name).write_text(yaml.safe_dump(values))
    return Path(name)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("schema", DATASET_FORMATS)
def test_synthetic_rows_are_rows_of_their_schema_with_images(schema, here):
    synthetic = write_synthetic_rows(DataSource(hub="org/data", format=schema), here / "rows")
    samples = read_samples(synthetic)
    assert len(samples) == ROWS
    assert all(open_medium(sample.images[0])[0].width > 1 for sample in samples)
    if synthetic.path.suffix == ".jsonl":
        rows = [json.loads(line) for line in synthetic.path.read_text().splitlines()]
        # A LLaVA row is a ShareGPT row too, and the first of both is recognized.
        assert {detect_schema(row, "row") for row in rows} <= {schema, "llava"}


@pytest.mark.parametrize(
    "source, schema",
    [
        ({"columns": {"question": "q", "answer": "a"}}, "vqa"),
        ({"columns": {"caption": "caption_0"}}, "caption"),
        ({}, "messages"),
    ],
)
def test_columns_keep_the_names_that_the_recipe_gives_them(source, schema, here):
    synthetic = write_synthetic_rows(DataSource(hub="org/data", **source), here / "rows")
    assert synthetic.format == schema and synthetic.columns == source.get("columns", {})
    row = json.loads(synthetic.path.read_text().splitlines()[0])
    assert {*source.get("columns", {}).values()} <= {*row}


@pytest.mark.parametrize("method, schema", [("dpo", "preference"), ("kto", "unpaired_preference")])
def test_the_method_decides_about_the_schema_of_synthetic_rows(method, schema, here):
    assert write_synthetic_rows(DataSource(hub="org/pairs"), here / "rows", method).format == schema


def test_a_recipe_whose_models_and_data_are_on_the_hub_is_tried_without_it(here, capfd):
    recipe = write_recipe(ON_HUB)
    before = sorted(here.iterdir())
    assert cli.main(["train", str(recipe), "--smoke"]) == 0
    error = capfd.readouterr().err
    assert "model.vision.name ViT-L-14: replaced by nano" in error
    assert "model.language.name org/language: replaced by nano" in error
    assert "data.train.0.hub org/questions: replaced by synthetic rows of the format vqa" in error
    assert sorted(here.iterdir()) == before


def test_the_trial_keeps_the_recipes_own_settings(here):
    recipe = load_recipe(write_recipe(ON_HUB), require=())
    trial = Trial(recipe, here / "trial").recipe
    assert trial.model.vision.quantization == "nf4" and trial.model.language.quantization == "int8"
    assert trial.lora.parts["language"].r == 4
    assert trial.train.optimizer == recipe.train.optimizer and trial.train.seed == recipe.train.seed
    assert trial.data.train[0].columns == recipe.data.train[0].columns


def test_files_that_are_there_are_read_and_those_that_are_not_are_named(here, capfd):
    values = {
        "model": {"vision": {"name": "nano"}, "language": {"name": "nano"}},
        "data": {
            "train": [{"path": "mine.jsonl"}, {"path": "later.json", "image_root": "coco", "format": "llava"}]
        },
        "train": {"output_dir": "run", "max_steps": 500},
    }
    synthetic = write_synthetic_rows(DataSource(hub="org/data"), here / "mine")
    synthetic.path.rename(here / "mine" / "mine.jsonl")
    values["data"]["train"][0]["path"] = "mine/mine.jsonl"
    assert cli.main(["train", str(write_recipe(values)), "--smoke"]) == 0
    error = capfd.readouterr().err
    assert (
        f"data.train.1.path: {here / 'later.json'} is not there yet; synthetic rows of the format llava"
        in error
    )
    (here / "mine" / "mine.jsonl").write_text('{"messages": "no list"}\n')
    assert cli.main(["train", str(write_recipe(values)), "--smoke"]) == 2
    assert "mine.jsonl: row 0" in capfd.readouterr().err


def test_a_recipe_that_starts_from_a_model_starts_from_one_of_its_shape(here):
    values = {
        **ON_HUB,
        "model": {
            **ON_HUB["model"],
            "init_from": "org/flamingo",
            "perceiver": {"depth": 2, "num_latents": 4},
        },
        "lora": {},
        "data": {"train": [{"hub": "org/pairs"}]},
        "train": {"output_dir": "run", "max_steps": 9, "method": "dpo"},
    }
    trial = Trial(load_recipe(write_recipe(values), require=()), here / "trial")
    assert any(line.startswith("model.init_from org/flamingo: replaced") for line in trial.stand_ins)
    config = json.loads((here / "trial" / "start" / "config.json").read_text())
    assert config["perceiver"]["num_latents"] == 4
    assert trial.recipe.model.init_from == (here / "trial" / "start")
    assert open_data(trial.recipe.data, seed=0).train[0].source.format == "preference"


def test_several_processes_are_refused(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "quickstart", "--smoke"]) == 2
    assert "start it without a launcher" in capfd.readouterr().err


def slow_unless_fast(name: str):
    return pytest.param(name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name", [slow_unless_fast(name) for name in packaged_recipes()])
def test_every_packaged_recipe_can_be_tried(name, here, capfd):
    assert cli.main(["train", name, "--smoke"]) == 0
    assert "the trial run finished" in capfd.readouterr().err and not list(here.iterdir())
