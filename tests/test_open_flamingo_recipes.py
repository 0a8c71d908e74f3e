"""Recipes that start from a released Flamingo train, on a local Hub with small models of the same names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS

from flamingo_ft import cli
from flamingo_ft.adapters import load_adapter
from flamingo_ft.adapters.released_models import RELEASED_MODELS, TOWER, ReleasedModel, find_released
from flamingo_ft.config import load_recipe
from flamingo_ft.config.library import packaged_recipes

from . import hub_folders
from .hub_folders import put
from .hub_server import Hub

FAMILIES = {"mpt-1b": "mosaic_gpt", "RedPajama": "gpt_neox", "mpt-7b": "mpt", "llama": "llama"}
RECIPES = [
    name
    for name in packaged_recipes()
    if re.fullmatch(
        r"open_flamingo_\db", name
    )  # the others differ from these in data and LoRA: test_trial.py
]
FEW = ["train.max_steps=2", "train.warmup_steps=1", "train.batch_size=2", "train.num_workers=0",
       "eval.max_samples=1", "eval.batch_size=8", "eval.max_new_tokens=2"]  # fmt: skip
TOWER_REPOSITORY = "timm/vit_large_patch14_clip_224.openai"


def stand_in(hub: Hub, model: ReleasedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Put a small model and its backbones in the place of a released one. Return its checkpoint."""
    family = next(family for part, family in FAMILIES.items() if part in model.languages[0])
    language = hub_folders.write_stand_in(folder / "language", family)
    put(hub, TOWER_REPOSITORY, hub_folders.write_tower(folder / "tower"))
    put(hub, model.languages[0], language)
    checkpoint = hub_folders.write_checkpoint(folder / "checkpoint", model, language, *TOWER)
    (checkpoint / "README.md").write_text("# OpenFlamingo")
    put(hub, model.name, checkpoint)
    return torch.load(checkpoint / "checkpoint.pt")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current directory; OpenCLIP takes ViT-L-14 for something small."""
    monkeypatch.setitem(_MODEL_CONFIGS, TOWER[0], hub_folders.TOWER)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_each_language_model_of_a_released_flamingo_has_a_recipe():
    starts = {find_released(load_recipe(name).model.init_from) for name in RECIPES}
    kinds = {model.layers_path + str(model.width) for model in starts}
    assert kinds == {
        model.layers_path + str(model.width) for model in RELEASED_MODELS if "deprecated" not in model.name
    }


def arguments_for(model: ReleasedModel) -> list[str]:
    """The recipe that starts from a model; or one for another model of its shape, with overrides."""
    starts = {name: find_released(load_recipe(name).model.init_from) for name in RECIPES}
    own = [name for name, start in starts.items() if start is model]
    if own:
        return own
    recipe = next(name for name, start in starts.items() if start.width == model.width)
    start = {
        "init_from": model.name,
        "language.name": model.languages[0],
        "media_visibility": model.visibility[0],
    }
    return [recipe, *(f"model.{key}={value}" for key, value in start.items())]


@pytest.mark.slow
@pytest.mark.parametrize("model", RELEASED_MODELS, ids=lambda model: model.name)
def test_each_released_model_trains_and_its_adapter_loads_again(model, hub, here):
    arguments = arguments_for(model)
    name = arguments[0]
    stored = stand_in(hub, model, here)
    assert cli.main(["train", *arguments, *FEW, "train.learning_rate=1.0e-9"]) == 0
    run = Path("runs", name)
    assert json.loads((run / "metrics.json").read_text())["train"]["steps"] == 2
    config = json.loads((run / "config.json").read_text())
    assert config["backbones"]["language"]["name"] == model.languages[0]
    assert config["backbones"]["vision"]["quantization"] and config["backbones"]["language"]["quantization"]
    path = config["bridge_init"]["path"]
    assert path == f"{model.name}@{hub.repositories[model.name].history[-1].oid}"

    loaded, processor = load_adapter(run)
    trained = hub_folders.open_flamingo_names(loaded, model, len(processor.tokenizer))
    assert trained.keys() == stored.keys()
    for (
        key,
        tensor,
    ) in stored.items():  # the learning rate is too small to change more than 16-bit rounding does
        assert torch.allclose(trained[key].float(), tensor, rtol=0.01, atol=1e-3), key
    assert any(tensor.dtype == torch.bfloat16 for tensor in trained.values())


@pytest.mark.parametrize("wrong", ["model.language.name=togethercomputer/RedPajama-INCITE-Instruct-3B-v1",
                                   "model.cross_attn_every_n_layers=1"])  # fmt: skip
@pytest.mark.parametrize("command", ["train", "plan"])
def test_other_backbones_are_refused_without_a_request(command, wrong, hub, here, capsys):
    assert cli.main([command, "open_flamingo_4b", wrong]) == 2
    error = capsys.readouterr().err
    assert "openflamingo/OpenFlamingo-4B-vitl-rpj3b needs model.language.name togethercomputer/" in error
    assert hub.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param(model, id=model.name) for model in RELEASED_MODELS])
def test_a_released_model_is_converted_by_its_name_and_exported_unchanged(model, hub, here):
    stored = stand_in(hub, model, here)
    assert cli.main(["convert", model.name, "adapter"]) == 0
    assert cli.main(["convert", "adapter", "back.pt", "--to", "open_flamingo"]) == 0
    back = torch.load("back.pt", weights_only=True)
    for key, tensor in stored.items():
        assert back[key].equal(tensor), key
