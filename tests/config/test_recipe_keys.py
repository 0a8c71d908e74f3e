"""Every key of a recipe is documented from its declaration: on the terminal, and for editors."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from rich.console import Console

from flamingo_ft.cli import main
from flamingo_ft.cli.recipes import print_keys
from flamingo_ft.config import Recipe, load_recipe
from flamingo_ft.config.keys import MODELINE, json_schema, markdown, recipe_keys, schema_text
from flamingo_ft.config.library import copy_recipe, library_folder, packaged_recipes
from flamingo_ft.config.validation_errors import dotted, recipe_locations
from flamingo_ft.config.yaml_document import parse
from flamingo_ft.errors import UserError

SCHEMA = library_folder() / "recipe.schema.json"


def test_every_key_that_a_recipe_may_have_is_listed_once_with_type_and_description():
    keys = recipe_keys()
    assert [key.name for key in keys] == [dotted(location) for location in recipe_locations(Recipe)]
    assert all(key.type and key.description and "\n" not in key.description for key in keys)


def value_at(recipe: Recipe, name: str):
    for step in name.split("."):
        recipe = recipe[int(step)] if step.isdecimal() else getattr(recipe, step)
    return recipe


def test_a_documented_default_is_the_one_that_a_recipe_gets(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    text = """\
model: {vision: {name: nano}, language: {name: nano}}
lora: {language: {}, vision: {}}
data: {train: [{path: x.jsonl}], tiles: {}, augmentation: {}}
train: {output_dir: run, epochs: 1}
"""
    (tmp_path / "r.yaml").write_text(text)
    recipe, document = load_recipe(tmp_path / "r.yaml"), parse(text, "r")
    compared = 0
    for key in recipe_keys():
        location = tuple(int(step) if step.isdecimal() else step for step in key.name.split("."))
        absent = key.name.startswith(("data.eval", "data.cache", "lora.c", "lora.p", "stages."))
        if key.is_section or absent or document.find(location)[1]:
            continue
        declared = value_at(recipe, key.name)
        declared = list(declared) if isinstance(declared, tuple) else declared
        assert parse(f"value: {key.default}", "x").values["value"] == declared, key.name
        compared += 1
    assert compared > 80


def test_required_keys_have_no_default():
    required = {key.name for key in recipe_keys() if key.default is None}
    assert {"model.vision.name", "data.train", "train.output_dir"} < required
    assert not required & {"train.max_steps", "train.epochs", "data.train.0.path"}


@pytest.mark.parametrize(
    ("prefix", "first", "count"),
    [
        ("train.dpo", "train.dpo", 5),
        ("train.dpo.", "train.dpo", 5),
        ("train.epochs", "train.epochs", 1),
        ("data.train.3.path", "data.train.0.path", 1),
    ],
)
def test_a_prefix_selects_a_key_and_every_key_below_it(prefix, first, count):
    keys = recipe_keys(prefix)
    assert (keys[0].name, len(keys)) == (first, count)


@pytest.mark.parametrize(
    ("prefix", "suggested"),
    [
        ("epochs", "did you mean train.epochs?"),
        ("train.epoch", "did you mean train.epochs?"),
        ("batch_size", "did you mean train.batch_size or eval.batch_size?"),
        ("train.dp", "did you mean train.dpo"),
        ("train.lr", "did you mean train.learning_rate or train.learning_rates?"),
        ("max_newtokens", "eval.max_new_tokens"),
        ("qqqqqq", "a recipe has the sections model, trainable, lora, data, train, eval"),
    ],
)
def test_an_unknown_prefix_is_refused_with_the_nearest_keys(prefix, suggested):
    with pytest.raises(UserError) as caught:
        recipe_keys(prefix)
    assert str(caught.value).startswith(f"recipes keys: no key {prefix}; ") and suggested in str(caught.value)
    assert "\n" not in str(caught.value)


def test_piped_keys_are_plain_text_of_two_lines_each(capsys):
    assert main(["recipes", "keys", "train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(recipe_keys("train")) and "\x1b" not in "".join(lines)
    assert "train.epochs  number > 0 or null, default null" in lines
    assert any(len(line) > 200 for line in lines), "a description is on one line, for grep"


def test_on_a_terminal_descriptions_are_wrapped_and_indented():
    out = io.StringIO()
    print_keys(
        recipe_keys("train.epochs"), Console(file=out, force_terminal=True, width=60, color_system=None)
    )
    head, *lines = out.getvalue().splitlines()
    assert head.startswith("train.epochs  ") and len(lines) > 3
    assert all(line.startswith("    ") and len(line) <= 60 for line in lines)


# --- the schema for editors ---


def test_the_schema_file_is_up_to_date():
    """Regenerate it with: flamingo-ft recipes schema > recipes/recipe.schema.json"""
    assert SCHEMA.read_text(encoding="utf-8") == schema_text()


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_names_the_schema_beside_it_and_conforms_to_it(name):
    text = packaged_recipes()[name].read_text(encoding="utf-8")
    assert MODELINE in text.splitlines()
    jsonschema.validate(yaml.safe_load(text), json.loads(SCHEMA.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"output_dir": "run", "max_stesp": 3, "epochs": 1}}, "'max_stesp' was unexpected"),
        ({"train": {"output_dir": "run"}}, "is not valid under any of the given schemas"),
        ({"eval": {"keep": "both"}}, "'both' is not one of"),
        ({"lora": {"lora_dropout": 1.5}}, "1.5 is greater than or equal to the maximum"),
    ],
)
def test_the_schema_rejects_what_a_recipe_rejects(change, message):
    recipe = yaml.safe_load(packaged_recipes()["quickstart"].read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate({**recipe, **change}, json_schema())


def test_the_schema_accepts_epochs_and_one_or_several_target_modules():
    recipe = yaml.safe_load(packaged_recipes()["bridge_lora"].read_text(encoding="utf-8"))
    for modules in ("all-linear", ["q_proj", "v_proj"]):
        recipe["lora"]["language"]["target_modules"] = modules
        recipe["train"] = {"output_dir": "run", "epochs": 1.5}
        jsonschema.validate(recipe, json_schema())


def test_the_schema_is_copied_with_a_recipe_and_an_existing_one_stays(tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    (library / "one.yaml").write_text("data: {train: []}")
    shutil.copyfile(SCHEMA, library / SCHEMA.name)
    monkeypatch.setattr("flamingo_ft.config.library.library_folder", lambda: library)
    assert [path.name for path in copy_recipe("one", tmp_path / "a")] == ["one.yaml", "recipe.schema.json"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "recipe.schema.json").write_text("mine")
    copy_recipe("one", tmp_path / "b")
    assert (tmp_path / "b" / "recipe.schema.json").read_text() == "mine"


# --- recipes/README.md ---


def test_the_page_of_all_keys_is_up_to_date():
    """Regenerate it with: flamingo-ft recipes keys --markdown > recipes/README.md"""
    assert (library_folder() / "README.md").read_text(encoding="utf-8") == markdown()


def test_the_page_of_all_keys_names_every_key_and_every_packaged_recipe():
    lines = markdown().splitlines()
    for key in recipe_keys():
        is_in_table = any(line.startswith(f"| `{key.name}` |") for line in lines)
        assert is_in_table or f"## {key.name}" in lines, key.name
    assert all(f"[{name}]({name}.yaml)" in markdown() for name in packaged_recipes())


def test_the_page_is_printed_only_in_full(capsys):
    assert main(["recipes", "keys", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown()
    assert main(["recipes", "keys", "train", "--markdown"]) == 2
    assert "remove it" in capsys.readouterr().err


# --- the commands ---


def test_show_prints_the_file_unchanged(capsys):
    assert main(["recipes", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == packaged_recipes()["quickstart"].read_text(encoding="utf-8")
    assert main(["recipes", "show", "quickstrat"]) == 2
    assert (
        capsys.readouterr().err
        == "error: recipe quickstrat: no packaged recipe of this name; did you mean quickstart?\n"
    )


def test_recipes_without_a_command_prints_the_list(capsys):
    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == listed and all(name in listed for name in packaged_recipes())


def test_looking_up_keys_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom flamingo_ft.cli import main\n"
        "codes = [main(['recipes', *one]) for one in (['keys'], ['schema'], ['show', 'dpo'], ['list'])]\n"
        "sys.exit(any(codes) or bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 0, result.stderr


def test_an_index_after_a_key_that_is_not_a_list_suggests_the_key_itself():
    with pytest.raises(
        UserError, match=r"no key lora\.language\.0; did you mean model\.language or lora\.language"
    ):
        recipe_keys("lora.language.0")
