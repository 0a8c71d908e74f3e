"""Stages of a recipe: common values merged into each, overrides that reach them, and mistakes in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from flamingo_ft.config import dump_recipe, load_recipe
from flamingo_ft.config.keys import json_schema
from flamingo_ft.config.paths import strip_recipe_paths
from flamingo_ft.errors import UserError

RECIPE = """\
model: {vision: {name: nano}, language: {name: nano}}
data: {train: [{path: train.jsonl}], max_text_tokens: 99}
train: {output_dir: run, batch_size: 2, learning_rate: 3.0e-3}
stages:
  - name: bridge
    train: {max_steps: 4}
  - name: lora
    lora: {language: {r: 4}}
    train: {epochs: 1, learning_rate: 1.0e-4}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*overrides: str):
    return load_recipe("./recipe.yaml", overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides)
    return str(caught.value).removeprefix("recipe.yaml:")


def test_a_stage_is_a_run_with_the_common_values_and_its_own(folder):
    bridge, lora = load().runs
    assert (bridge.train.learning_rate, lora.train.learning_rate) == (3e-3, 1e-4)
    assert [run.train.batch_size for run in (bridge, lora)] == [2, 2]
    assert [run.data.max_text_tokens for run in (bridge, lora)] == [99, 99]
    assert not bridge.lora.parts and lora.lora.language.r == 4
    assert [run.train.output_dir for run in (bridge, lora)] == [Path("run/1-bridge"), Path("run/2-lora")]
    assert bridge.model.init_from is None and lora.model.init_from == folder / "run" / "1-bridge"


def test_a_later_stage_is_the_run_that_a_recipe_with_init_from_describes(folder):
    separate = yaml.safe_load(RECIPE)
    stage = separate.pop("stages")[1]
    separate["train"] |= stage["train"] | {"output_dir": "run/2-lora"}
    separate |= {"lora": stage["lora"], "eval": {"before": False}}
    separate["model"] |= {"init_from": str(folder / "run" / "1-bridge"), "perceiver": {"depth": 0}}
    (folder / "separate.yaml").write_text(yaml.safe_dump(separate))
    assert load().runs[1] == load_recipe("./separate.yaml", require=("data",))


def test_the_recipes_own_sections_are_those_of_its_last_stage():
    recipe = load()
    assert recipe.lora == recipe.runs[-1].lora and recipe.eval == recipe.runs[-1].eval
    assert recipe.train.output_dir == Path("run") and recipe.train.epochs == 1


def test_a_dumped_recipe_has_the_same_stages_and_repeats_no_common_value(folder):
    recipe = load("train.checkpoint_dir=drive")
    (folder / "resolved_recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(folder / "resolved_recipe.yaml") == recipe
    stages = yaml.safe_load(dump_recipe(recipe))["stages"]
    assert stages[1] == {"name": "lora"} and "data" not in stages[0]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.max_steps=3"], [3, 3]),
        (["stages.0.train.max_steps=9", "stages.1.train.max_steps=7"], [9, 7]),
        (["train.max_steps=3", "stages.1.train.max_steps=7"], [3, 7]),
    ],
)
def test_an_override_of_a_common_value_reaches_every_stage_and_one_of_a_stage_that_stage(overrides, steps):
    assert [run.train.max_steps for run in load(*overrides).runs] == steps


def test_a_length_in_another_unit_replaces_the_one_that_a_stage_has():
    assert [run.train.epochs for run in load("train.epochs=2").runs] == [2, 2]
    runs = load("stages.0.train.epochs=0.5").runs
    assert [(run.train.max_steps, run.train.epochs) for run in runs] == [(None, 0.5), (None, 1)]


def test_a_stage_overrides_lists_as_a_whole_and_mappings_key_by_key(folder):
    (folder / "more.jsonl").write_text("{}\n")
    values = yaml.safe_load(RECIPE)
    values["stages"][1]["data"] = {"train": [{"path": "more.jsonl"}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    data = load().runs[1].data
    assert [source.path.name for source in data.train] == ["more.jsonl"] and data.max_text_tokens == 99
    replaced = load("data.train=[{path: train.jsonl}]").runs[1].data.train
    assert [source.path for source in replaced] == [folder / "train.jsonl"]


def tiles(largest: int = 4, tags: str = "learned", size: int | str = "auto") -> str:
    return f"{{max: {largest}, size: {size}, thumbnail: true, tags: {tags}}}"


WITHOUT_PERCEIVER = "model.perceiver=null"


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (tiles(), tiles(6)),
        (tiles(), "null"),
        (tiles(), tiles(tags="none")),
        (tiles(), tiles(tags="text")),
        (tiles(), tiles(size=64)),
        (tiles(tags="text"), tiles(6, tags="text")),
        (tiles(tags="none"), tiles(6)),
        ("null", tiles(tags="text")),
    ],
)
def test_tiles_other_than_those_of_the_stage_before_are_refused(earlier, later):
    overrides = (f"stages.0.data.tiles={earlier}", f"stages.1.data.tiles={later}", WITHOUT_PERCEIVER)
    assert refusal(*overrides).endswith(
        f": stages.1 (lora): data.tiles: got {later}, but stages.0 (bridge), whose bridge is trained "
        f"further, has {earlier}; use the same in both"
    )


@pytest.mark.parametrize("earlier", ["null", tiles(tags="none")])
def test_learned_tags_of_tiles_can_be_added_where_the_perceiver_is_trained(earlier):
    added = (f"stages.0.data.tiles={earlier}", f"stages.1.data.tiles={tiles()}")
    assert load(*added).runs[1].data.tiles.tags == "learned"
    assert refusal(*added, "stages.1.trainable.perceiver=false").endswith(
        ": stages.1 (lora): data.tiles: stages.0 (bridge) learns no places of tiles, and this stage cannot "
        "with trainable.perceiver false; set it to true, or data.tiles.tags to none"
    )


def test_learned_tags_of_tiles_stay_where_the_perceiver_is_no_longer_trained():
    frozen = load(f"data.tiles={tiles()}", "stages.1.trainable.perceiver=false").runs[1]
    assert frozen.data.tiles.max == 4


NOTHING = "trainable={perceiver: false, cross_attention: false, new_tokens: false}"
COMMON = "set model once for the whole recipe"
OTHER_ROWS = (
    "stages.1 (lora): data.eval_fraction: holds out different rows from stages.0 (bridge), so one of the two "
    "may train on rows that the other holds out; name held-out rows with data.eval in all stages, or use the "
    "same data.train, fraction and seed"
)
MISTAKES = {
    ("stages=[]", "train.max_steps=1"): "stages: got an empty list; give at least one entry",
    (f"stages.0.{NOTHING}",): (
        "stages.0 (bridge): trainable: nothing would be trained; set one part to true, or configure lora for "
        "one"
    ),
    ("stages.0.train={}",): "stages.0 (bridge): train.max_steps: missing; add it, or train.epochs instead",
    ("stages.1.name=bridge",): "stages.1 (bridge): name: stages.0 has the same name; use another",
    ("stages.1.name=../x",): (
        "stages.1 (../x): name: must be the name of a folder, of letters, digits, '.', '_' and '-', "
        "got '../x'"
    ),
    ("stages.1.model={init_from: x}",): (
        "stages.1 (lora): model: cannot vary: all stages train the same model, each from where the one "
        f"before it ended; {COMMON}"
    ),
    ("stages.1.init_from=x",): (
        "stages.1 (lora): init_from: cannot vary: all stages train the same model, each from where the one "
        f"before it ended; {COMMON}"
    ),
    ("stages.0.train.output_dir=x",): (
        "stages.0 (bridge): train.output_dir: cannot vary: it holds for the whole run, in which every stage "
        "has its own folder; set train.output_dir once for the whole recipe"
    ),
    ("stages.1.train.max_stps=3",): (
        "stages.1 (lora): train.max_stps: unknown key; did you mean stages.1.train.max_steps?"
    ),
    ("stages.1.max_steps=3",): "stages.1 (lora): max_steps: unknown key; did you mean train.max_steps?",
    ("stages.1.train.batch_size=x",): "stages.1 (lora): train.batch_size: must be a whole number, got 'x'",
    ("train.batch_size=x",): "train.batch_size: must be a whole number, got 'x'",
    ("stages.1.lora.perceiver={}",): (
        "stages.1 (lora): lora.perceiver: trainable.perceiver is true too; train the part in full or through "
        "LoRA: set one to false or null"
    ),
    ("stages.0.lora.language={r: 8}",): (
        "stages.1 (lora): lora: differs from that of stages.0 (bridge), whose LoRA weights are trained "
        "further; use the same parts, ranks, targets, use_dora and use_rslora"
    ),
    ("lora.language={r: 4}", "lora.init_lora_weights=pissa"): (
        "stages.0 (bridge): lora.init_lora_weights: pissa is stored as LoRA of twice the rank, which a later "
        "stage cannot train further; use another initialization, or pissa in the last stage alone"
    ),
    ("data.eval_fraction=0.5", "stages.1.train.seed=1"): OTHER_ROWS,
    (
        "stages.0.data.eval_fraction=0.5",
        "stages.1.data={eval_fraction: null, eval: [{path: train.jsonl}]}",
    ): OTHER_ROWS,
    (
        "model.init_from=train.jsonl",
        "model.bridge_quantization=nf4",
        "stages.0.trainable.cross_attention=false",
        f"stages.1.{NOTHING}",
    ): (
        "model.bridge_quantization: would quantize the perceiver resampler in a stage after one that trains "
        "it; use none, or set trainable.perceiver alike in all later stages"
    ),
}


@pytest.mark.parametrize("overrides", MISTAKES, ids=" ".join)
def test_a_mistake_is_reported_in_one_line_with_its_stage(overrides):
    message = refusal(*overrides)
    assert message.endswith(f": {MISTAKES[overrides]}") and "\n" not in message


def test_an_invalid_common_value_is_reported_once_with_its_own_line(folder):
    (folder / "recipe.yaml").write_text(RECIPE.replace("batch_size: 2", "batch_size: none"))
    assert refusal() == "3: train.batch_size: must be a whole number, got 'none'"


def test_paths_in_a_stage_start_from_the_recipes_folder_and_have_to_exist(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    values = yaml.safe_load(RECIPE)
    values["stages"][1]["data"] = {"train": [{"path": "gone.jsonl"}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"stages.1 \(lora\): data.train.0.path: .*gone.jsonl"):
        load_recipe(folder / "recipe.yaml")


def test_a_published_recipe_has_no_folder_of_this_machine_in_its_stages(folder):
    (folder / "more.jsonl").write_text("{}\n")
    values = yaml.safe_load(RECIPE)
    values["stages"][0]["data"] = {"train": [{"path": "more.jsonl"}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    published = strip_recipe_paths(yaml.safe_load(dump_recipe(load())))
    assert published["stages"][0]["data"]["train"][0]["path"] == "more.jsonl"
    assert str(folder) not in json.dumps(published)


# --- the schema for editors ---


def test_the_schema_accepts_stages_that_have_what_the_common_sections_lack():
    recipe = yaml.safe_load(RECIPE)
    jsonschema.validate(recipe, json_schema())
    in_stages = copy.deepcopy(recipe)
    data = in_stages.pop("data")
    for stage in in_stages["stages"]:
        stage["data"] = data
    jsonschema.validate(in_stages, json_schema())


@pytest.mark.parametrize(
    "change",
    [
        {"model": {}},
        {"train": {"max_stesp": 1}},
        {"train": {"output_dir": "x"}},
        {"lora": {"lora_dropout": 2}},
        {"name": 3},
    ],
    ids=json.dumps,
)
def test_the_schema_rejects_what_a_stage_rejects(change):
    recipe = yaml.safe_load(RECIPE)
    recipe["stages"][0] |= change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, json_schema())
