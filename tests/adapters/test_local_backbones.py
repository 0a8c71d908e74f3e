"""Backbones in local folders are found from any directory and after a move; their paths stay unpublished."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flamingo_ft.adapters import load_adapter, save_adapter, write_composition
from flamingo_ft.adapters.load import restore_trainable
from flamingo_ft.backbones.language import NANO_FOLDER as NANO_LANGUAGE
from flamingo_ft.backbones.language import load_language
from flamingo_ft.backbones.tower_source import NANO_FOLDER as NANO_TOWER
from flamingo_ft.backbones.vision import load_vision
from flamingo_ft.config import load_recipe
from flamingo_ft.errors import UserError
from flamingo_ft.model.build import backbone_files
from flamingo_ft.publish.push import files_to_push, publishable_files

from ..regimes import RECIPE, build, logits, shake

LOCAL = RECIPE.replace("vision: {name: nano", "vision: {name: models/eyes").replace(
    "language: {name: nano", "language: {name: words"
)


@pytest.fixture(scope="module")
def made(trained_start, tmp_path_factory):
    """A folder with a recipe that names both backbones by relative paths, its adapter, and the logits."""
    folder = tmp_path_factory.mktemp("local")
    shutil.copytree(trained_start, folder, dirs_exist_ok=True)
    shutil.copytree(NANO_LANGUAGE, folder / "words")
    shutil.copytree(NANO_TOWER, folder / "models" / "eyes")
    (folder / "recipe.yaml").write_text(LOCAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model, processor = build()
        shake(model, 0.3)
        save_adapter(model, processor, folder / "runs" / "one")
    return folder, logits(model, processor)


@pytest.fixture
def local(made, tmp_path, monkeypatch):
    """A copy of that folder elsewhere; the current directory is a third one."""
    folder, expected = made
    here = tmp_path / "moved"
    shutil.copytree(folder, here)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return here, expected


def backbones(adapter: Path) -> dict:
    return json.loads((adapter / "config.json").read_text())["backbones"]


def rewrite(adapter: Path, **names: str) -> None:
    """Record other names of an adapter's backbones, as earlier versions did."""
    config = json.loads((adapter / "config.json").read_text())
    for part, name in names.items():
        config["backbones"][part]["name"] = name
    (adapter / "config.json").write_text(json.dumps(config))
    peft = json.loads((adapter / "adapter_config.json").read_text())
    peft["base_model_name_or_path"] = names.get("language", peft["base_model_name_or_path"])
    (adapter / "adapter_config.json").write_text(json.dumps(peft))


def test_an_adapter_records_absolute_paths_and_loads_from_every_directory(made, tmp_path, monkeypatch):
    folder, expected = made
    assert {part: one["name"] for part, one in backbones(folder / "runs/one").items()} == {
        "vision": str(folder / "models" / "eyes"),
        "language": str(folder / "words"),
    }
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(*load_adapter(folder / "runs/one")), expected)


def test_backbones_beside_a_moved_adapter_are_found_and_recorded_there(local, made, monkeypatch):
    here, expected = local
    names = {"vision": "/gone/models/eyes", "language": "/gone/words"}
    rewrite(here / "runs/one", **names)
    with pytest.raises(UserError) as caught:
        load_adapter(here / "runs/one")
    message = str(caught.value)
    assert (
        f"one: language backbone /gone/words is not there (looked at /gone/words, {here}/runs/words); put it"
        in message
    )
    for folder in ("words", "models/eyes"):
        shutil.move(here / folder, here / "runs")
    model, processor = load_adapter(here / "runs/one")
    assert torch.equal(logits(model, processor), expected)
    save_adapter(model, processor, here / "again")
    assert backbones(here / "again")["language"]["name"] == str(here / "runs" / "words")
    peft_config = json.loads((here / "again/adapter_config.json").read_text())
    assert peft_config["base_model_name_or_path"] == str(here / "runs" / "words")
    assert torch.equal(logits(*load_adapter(here / "again")), expected)


def test_an_adapter_with_paths_relative_to_its_training_directory_still_loads(local):
    here, expected = local
    rewrite(here / "runs/one", vision="models/eyes", language="words")
    assert torch.equal(logits(*load_adapter(here / "runs/one")), expected)


def test_a_folder_of_the_same_name_in_the_current_directory_is_not_taken_for_a_backbone_on_the_hub(
    local, monkeypatch
):
    """A revision is a commit on the Hub, even if a local folder has the same name."""
    here, _ = local
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set|not in the cache"):
        load_language("words", "0" * 40, local_files_only=True)


def test_a_checkpoint_resumes_after_its_backbones_moved(local, made, monkeypatch):
    here, _ = local
    monkeypatch.chdir(here)
    model, processor = build()
    restore_trainable(model, here / "runs/one")
    shake(model, 0.3)
    with pytest.raises(UserError, match="trained with another language backbone: sha256 0{64}, got "):
        config = json.loads((here / "runs/one/config.json").read_text())
        config["backbones"]["language"]["sha256"] = "0" * 64
        (here / "runs/one/config.json").write_text(json.dumps(config))
        restore_trainable(model, here / "runs/one")


def test_pushed_files_have_no_path_of_a_local_backbone(made, tmp_path):
    folder, _ = made
    write_composition(folder / "runs/one", tmp_path / "base")
    pushed = {**files_to_push(folder / "runs/one", "org/name"), **publishable_files(tmp_path / "base")}
    assert {"config.json", "adapter_config.json", "README.md"} <= pushed.keys()
    for name, content in pushed.items():
        content = content if isinstance(content, bytes) else content.read_bytes()
        assert str(folder).encode() not in content, name


def test_relative_paths_of_backbones_are_recorded_as_absolute_ones(local, monkeypatch):
    here, _ = local
    monkeypatch.chdir(here)
    assert load_language("words").source["name"] == str(here / "words")
    assert load_vision("models/eyes").source["name"] == str(here / "models" / "eyes")
    assert load_vision("local-dir:models/eyes").source["name"] == str(here / "models" / "eyes")
    assert load_language("nano").source["name"] == "nano" == load_vision("nano").source["name"]


def test_a_path_into_the_hubs_cache_is_recorded_as_a_local_folder(local, monkeypatch):
    here, _ = local
    folder = here / "models--org--words" / "snapshots" / ("0" * 40)
    shutil.copytree(here / "words", folder)
    source = load_language(str(folder)).source
    assert (source["name"], source["revision"]) == (str(folder), None)


def test_planning_and_checking_resolve_backbones_against_the_recipes_folder(local):
    here, _ = local
    files = backbone_files(load_recipe(here / "recipe.yaml").model)
    assert files.language.num_hidden_layers and files.tower["vision_cfg"]
    with pytest.raises(UserError, match="no folder .*/elsewhere/words"):
        load_recipe(here / "recipe.yaml", ["model.language.name=./words"], require=("backbones",))
