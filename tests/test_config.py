"""A recipe is read strictly: what is accepted is exact; what is refused is told with its place and remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flamingo_ft.config import Recipe, dump_recipe, load_recipe
from flamingo_ft.config.document import parse
from flamingo_ft.errors import UserError

MINIMAL = """\
model:
  vision: {name: nano}
  language: {name: nano}
data:
  train:
    - path: train.jsonl
train:
  output_dir: runs/one
  max_steps: 10
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The recipe's folder, with its data; the current directory is another one."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


def write(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """What is said about a recipe, with the recipe's own path shortened to `recipe.yaml`."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "recipe.yaml")


# --- what is accepted ---


def test_a_recipe_without_optional_keys_gets_the_declared_defaults(folder):
    recipe = load_recipe(write(folder))
    assert recipe.model.perceiver.num_latents == 64 and recipe.model.cross_attn_every_n_layers == 1
    assert recipe.trainable.new_tokens and recipe.lora.language is None
    assert recipe.data.eval == () and recipe.data.train[0].weight == 1.0
    assert recipe.train.seed == 0 and recipe.eval.before and recipe.eval.shuffled_images


def test_a_recipe_is_frozen(folder):
    recipe = load_recipe(write(folder))
    with pytest.raises(ValidationError):
        recipe.train.max_steps = 3


def test_a_dumped_recipe_loads_as_the_same_recipe(folder):
    recipe = load_recipe(write(folder), ["train.learning_rate=3e-4", "data.train.0.weight=2"])
    assert load_recipe(write(folder, dump_recipe(recipe))) == recipe


def test_every_key_is_described_in_the_json_schema():
    schema = Recipe.model_json_schema()
    json.dumps(schema)
    sections = [schema, *schema["$defs"].values()]
    assert len(sections) > 10 and all(section["description"] for section in sections)
    for section in sections:
        assert section["additionalProperties"] is False
        for name, key in section["properties"].items():
            described = key.get("description") or "$ref" in key  # a section describes itself
            assert described, f"{section['title']}.{name} has no description"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".0001", "0.0001", "+1e-4", "1.0e-4"])
def test_a_number_may_be_written_in_every_usual_way(folder, text):
    assert load_recipe(write(folder), [f"train.learning_rate={text}"]).train.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["on", "no", "12:30", "2024-01-01", "0123", "1_", "0x1f", "none", "1e", "."])
def test_text_that_only_older_yaml_reads_as_something_else_stays_text(text):
    assert parse(f"key: {text}", "x").values == {"key": text}


def test_anchors_and_merges_work_and_errors_in_them_are_found(folder):
    text = MINIMAL + "  <<: &more {seed: 3, batch_size: 4}\n  batch_size: 2\n"
    recipe = load_recipe(write(folder, text))
    assert (recipe.train.seed, recipe.train.batch_size) == (3, 2)
    assert refusal(write(folder, text.replace("seed: 3", "sed: 3"))).startswith(
        "recipe.yaml:10: train.sed: unknown"
    )


# --- paths ---


def test_paths_in_the_file_start_from_the_file_and_paths_in_overrides_from_the_current_directory(folder):
    recipe = load_recipe(write(folder))
    assert recipe.data.train[0].path == folder / "train.jsonl"
    here = folder / "elsewhere"
    (here / "mine.json").write_text("[]")
    (here / "photos").mkdir()
    overridden = load_recipe(write(folder), ["data.train=[{path: mine.json, image_root: photos}]"])
    assert overridden.data.train[0].path == here / "mine.json"
    assert overridden.data.train[0].image_root == here / "photos"
    # One key of an entry from the command line, the other from the file.
    mixed = load_recipe(write(folder), ["data.train.0.image_root=photos"])
    assert mixed.data.train[0].path == folder / "train.jsonl"
    assert mixed.data.train[0].image_root == here / "photos"


def test_the_output_folder_starts_from_the_current_directory(folder):
    assert load_recipe(write(folder)).train.output_dir == Path("runs/one")
    assert load_recipe(write(folder), ["train.output_dir=~/x"]).train.output_dir == Path.home() / "x"


def test_only_an_explicit_path_to_a_backbone_is_taken_for_a_path(folder):
    text = MINIMAL.replace("language: {name: nano}", "language: {name: ./lm}")
    recipe = load_recipe(write(folder, text), ["model.vision.name=org/tower"])
    assert recipe.model.language.name == str(folder / "lm")
    assert recipe.model.vision.name == "org/tower"


def test_a_missing_file_is_refused_with_its_line_unless_files_are_not_wanted(folder):
    path = write(folder, MINIMAL.replace("train.jsonl", "gone.jsonl"))
    missing = folder / "gone.jsonl"
    assert refusal(path) == (
        f"recipe.yaml:6: data.train.0.path: found no file {missing}; "
        "relative paths here start from the recipe's folder"
    )
    assert load_recipe(path, require=()).data.train[0].path == missing


# --- refusals ---

WRONG_LINES = [
    (
        "  vision: {name: nano}",
        "  vison: {name: nano}",
        "2: model.vison: unknown key; did you mean model.vision?",
    ),
    ("  max_steps: 10", "  max_stesp: 10", "9: train.max_stesp: unknown key; did you mean train.max_steps?"),
    ("  max_steps: 10", "  max_steps: ten", "9: train.max_steps: found 'ten'; want a whole number"),
    ("  max_steps: 10", "  max_steps: '10'", "9: train.max_steps: found '10'; want a whole number"),
    ("  max_steps: 10", "  max_steps: 1.5", "9: train.max_steps: found 1.5; want a whole number"),
    ("  max_steps: 10", "  max_steps: true", "9: train.max_steps: found true; want a whole number"),
    ("  max_steps: 10", "  max_steps: 0", "9: train.max_steps: found 0; want 1 or more"),
    ("  max_steps: 10", "  max_steps:", "9: train.max_steps: missing; add it, or train.epochs in its place"),
    ("  max_steps: 10", "  max_steps: [1]", "9: train.max_steps: found a list; want a whole number"),
    ("  max_steps: 10\n", "", "7: train.max_steps: missing; add it"),
    ("    - path: train.jsonl", "    - image_root: x", "6: data.train.0: found neither path nor hub; give one of them"),
    (
        "    - path: train.jsonl",
        "    - train.jsonl",
        "6: data.train.0: found 'train.jsonl'; want a mapping of keys",
    ),
    ("    - path: train.jsonl", "    []", "5: data.train: found an empty list; give at least one entry"),
    (
        "{name: nano}\ndata",
        "{name: 12}\ndata",
        "3: model.language.name: found 12; want text (put it in quotes)",
    ),
    ("{name: nano}\ndata", "nano\ndata", "3: model.language: found 'nano'; want a mapping of keys to values"),
]


@pytest.mark.parametrize("right, wrong, told", WRONG_LINES)
def test_a_wrong_line_is_refused_in_one_line_with_its_number_and_what_was_found(folder, right, wrong, told):
    assert right in MINIMAL
    message = refusal(write(folder, MINIMAL.replace(right, wrong)))
    assert message.startswith(f"recipe.yaml:{told}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "extra, told",
    [
        ("learning_rate: 1e-4", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("heads: 8", "did you mean model.perceiver.heads or model.cross_attention.heads?"),
        ("vision: {name: nano}", "did you mean model.vision or lora.vision?"),
        ("zzz: 1", "zzz: unknown key; known here are model, trainable, lora, data, train, eval"),
        ("eval: {sed: 1}", "eval.sed: unknown key; did you mean train.seed?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_keys(folder, extra, told):
    message = refusal(write(folder, MINIMAL + extra + "\n"))
    assert message.startswith("recipe.yaml:10: ") and message.endswith(told)


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("model.language.quantization", "int4", "'int4'; want 'none', 'int8', 'nf4' or 'fp4'"),
        ("model.vision.compute_dtype", "half", "'half'; want 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("train.optimizer", "sgd", "'sgd'; want 'adamw', 'adamw_8bit', 'paged_adamw' or 'paged_adamw_8bit'"),
        ("data.too_long", "cut", "'cut'; want 'error', 'drop_sample', 'drop_turns' or 'truncate_text'"),
    ],
)
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(folder, key, value, told):
    override = f"{key}={value}"
    assert refusal(write(folder), override) == f"override {override}: {key}: found {told}"


def test_training_nothing_is_refused(folder):
    message = refusal(
        write(folder), "trainable={perceiver: false, cross_attention: false, new_tokens: false}"
    )
    assert message.endswith("trainable: nothing would train; set one part to true, or give one LoRA")


@pytest.mark.parametrize(
    "override, told",
    [
        ("lora.perceiver={}", "lora.perceiver: trainable.perceiver is true too; a part trains whole or through LoRA"),
        ("model.bridge_quantization=nf4", "model.bridge_quantization: a fresh bridge has nothing worth freezing"),
        (
            "model={init_from: x, bridge_quantization: nf4, vision: {name: nano}, language: {name: nano}}",
            "model.bridge_quantization: all of the bridge trains, and what trains cannot be quantized",
        ),
        ("lora.language={r: 0}", "lora.language.r: found 0; want 1 or more"),
        ("lora.language={rank: 8}", "lora.language.rank: unknown key; known here are r, lora_alpha, target_modules"),
        ("lora.language={target_modules: 3}", "lora.language.target_modules: found 3; want a list"),
        ("lora.langage={}", "lora.langage: unknown key; did you mean lora.language?"),
    ],
)
def test_a_value_that_contradicts_another_or_fits_no_lora_is_refused_in_one_line(folder, override, told):
    assert refusal(write(folder), override).startswith(f"override {override}: {told}")


def test_a_run_to_start_from_is_kept_by_its_absolute_path_and_must_be_there(folder):
    message = refusal(write(folder), "model.init_from=gone")
    assert f"model.init_from: found nothing at {folder}/elsewhere/gone; it starts from the current directory" in message
    recipe = load_recipe(write(folder), ["model.init_from=gone"], require=("data",))
    assert recipe.model.init_from == folder / "elsewhere" / "gone"


def test_a_step_inside_the_backward_pass_refuses_accumulation(folder):
    message = refusal(write(folder), "train.optimizer_in_backward=true", "train.gradient_accumulation_steps=4")
    assert message == (
        "override train.optimizer_in_backward=true: train.optimizer_in_backward: found gradient_accumulation_steps 4; "
        "a step inside the backward pass sees one batch: use 1 and a larger batch_size, or set it to false"
    )


EXCLUSIVE = {
    ("data.cache={folder: tokens}", "data.augmentation={flip: 0.5}"): "data.cache: tokens of an image that changes each",
    ("data.cache={folder: tokens}", "lora.vision={r: 2}"): "data.cache: lora.vision changes the tower",
    ("data.packing=true",): "data.packing: a row has to be of some length; set data.max_text_tokens",
    ("data.packing=true", "data.max_text_tokens=64", "data.group_by_length=true"): "data.group_by_length: packed rows are all of one length",
    ("data.eval_fraction=0.1", "data.train.0.streaming=true"): "data.eval_fraction: a share of a stream cannot be held out",
    ("data.train.0.hub=org/name",): "data.train.0: found both path and hub; give one of them",
    ("data.train.0.config=small",): "data.train.0.config: goes with hub",
    ("data.train.0.revision=main",): "data.train.0.revision: goes with hub",
}


@pytest.mark.parametrize("overrides", EXCLUSIVE, ids=" ".join)
def test_wishes_for_data_that_exclude_each_other_are_refused_in_one_line(folder, overrides):
    message = refusal(write(folder), *overrides)
    assert EXCLUSIVE[overrides] in message and "\n" not in message


LENGTHS = {
    ("train={output_dir: x, max_steps: 3, epochs: 2}",): "train.epochs: got 2 beside max_steps 3; remove one of them",
    ("train.epochs=2", "train.max_steps=3"): "train.epochs: got 2 beside max_steps 3; remove one of them",
    ("train.epochs=0",): "train.epochs: found 0; want more than 0",
    ("train.epochs=2", "data.train.0.streaming=true"): "train.epochs: a streamed source has no known length",
    ("train.warmup_ratio=1",): "train.warmup_ratio: ",
    ("train.warmup_ratio=0.1", "train.warmup_steps=3"): "train.warmup_ratio: got 0.1 beside warmup_steps 3; remove one",
    ("train={output_dir: x}",): "train.max_steps: missing; add it, or train.epochs in its place",
}


@pytest.mark.parametrize("overrides", LENGTHS, ids=" ".join)
def test_the_length_of_a_run_is_given_once_and_of_a_stream_in_steps(folder, overrides):
    message = refusal(write(folder), *overrides)
    assert LENGTHS[overrides] in message and "\n" not in message


def test_an_override_in_epochs_replaces_the_steps_of_the_file_and_the_other_way_round(folder):
    recipe = load_recipe(write(folder), ["train.epochs=1.5", "train.warmup_ratio=0.1"])
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.train.warmup_steps) == (1.5, None, 0)
    in_epochs = write(folder, MINIMAL.replace("max_steps: 10", "epochs: 3\n  warmup_ratio: 0.1"))
    recipe = load_recipe(in_epochs, ["train.max_steps=7", "train.warmup_steps=2"])
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.train.warmup_ratio) == (None, 7, None)
    assert load_recipe(in_epochs, ["train.seed=1"]).train.epochs == 3


def test_a_data_path_may_be_a_folder_or_a_pattern_of_files_that_is_there(folder):
    (folder / "photos").mkdir()
    for path in ("photos", "*.jsonl"):
        assert load_recipe(write(folder), [f"data.train.0.path={folder}/{path}"])
    assert "found no file" in refusal(write(folder), f"data.train.0.path={folder}/*.tar")


def test_every_problem_has_a_line_of_its_own_in_the_order_of_the_file(folder):
    text = MINIMAL.replace("vision", "vison").replace("10", "ten") + "  seed: -1\n"
    lines = refusal(write(folder, text)).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["recipe.yaml:2", "recipe.yaml:9", "recipe.yaml:10"]


@pytest.mark.parametrize(
    "text, told",
    [
        (MINIMAL + "  max_steps: 12\n", "recipe.yaml:10: max_steps: given twice, first on line 9; keep one"),
        (MINIMAL + "1: 2\n", "recipe.yaml:10: found 1 as a key; keys are text"),
        (MINIMAL + "[a]: 2\n", "recipe.yaml:10: found a list or mapping as a key; keys are text"),
        (
            MINIMAL + "\tseed: 2\n",
            "recipe.yaml:10: not valid YAML: found character '\\t' that cannot start any token",
        ),
        ("model: {vision: nano\n", "recipe.yaml:2: not valid YAML: "),
        (
            "model: !!python/object:os.system {}\n",
            "recipe.yaml:1: not valid YAML: found a tag; a recipe has none",
        ),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML: but found another document"),
        (
            "a: \x00\n",
            "recipe.yaml:1: not valid YAML: special characters are not allowed; remove the character",
        ),
        (
            "",
            "recipe.yaml:1: found no mapping; a recipe has the keys model, trainable, lora, data, train",
        ),
        ("# only a comment\n", "recipe.yaml:1: found no mapping"),
        ("- a\n", "recipe.yaml:1: found no mapping"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_refused_with_the_line(folder, text, told):
    message = refusal(write(folder, text))
    assert message.startswith(told) and "\n" not in message


def test_a_file_that_is_not_text_is_refused(folder):
    path = write(folder)
    path.write_bytes(b"model: \xff\xfe")
    assert refusal(path) == "recipe.yaml: not UTF-8 text (byte 7); save the recipe as UTF-8"


def test_a_recipe_that_contains_itself_is_refused(folder):
    assert refusal(write(folder, MINIMAL + "eval: &a\n  before: *a\n")).startswith(
        "recipe.yaml:11: eval.before: found a mapping; want true or false"
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_whatever_stands_in_a_recipe_the_answer_is_a_recipe_or_a_refusal(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("any")
    for content in (value, {"model": value, "data": {"train": value}, "train": {"max_steps": value}}):
        with pytest.raises(UserError) as refused:
            load_recipe(path := write(folder, yaml.safe_dump(content)))
        assert all(line.startswith(f"{path}:") for line in str(refused.value).splitlines())


# --- overrides ---


def test_an_override_counts_more_than_the_file_and_a_later_one_more_than_an_earlier(folder):
    recipe = load_recipe(write(folder), ["train.max_steps=11", "train.max_steps=12", "eval.before=false"])
    assert recipe.train.max_steps == 12 and recipe.eval.before is False


def test_an_override_can_give_what_the_file_lacks(folder):
    path = write(folder, MINIMAL.replace("  max_steps: 10\n", ""))
    assert load_recipe(path, ["train.max_steps=3"]).train.max_steps == 3


@pytest.mark.parametrize(
    "override, told",
    [
        ("train.max_steps", "override 'train.max_steps': want KEY=VALUE, such as train.max_steps=10"),
        ("=3", "override '=3': want KEY=VALUE, such as train.max_steps=10"),
        ("train..seed=3", "override 'train..seed=3': want KEY=VALUE, such as train.max_steps=10"),
        ("train.max_step=3", ": train.max_step: unknown key; did you mean train.max_steps?"),
        ("trian.seed=3", ": trian: unknown key; did you mean train?"),
        ("train.seed=x", ": train.seed: found 'x'; want a whole number"),
        ("train.seed=[", ":1: not valid YAML: expected the node content, but found '<stream end>'"),
        ("train.seed.x=3", ": train.seed: found a mapping; want a whole number"),
        (
            "train.max_steps.x=3",
            ": train.max_steps is a single value and has no keys; set train.max_steps itself",
        ),
        (
            "data.train.1.path=x",
            ": data.train is a list of 1; use an index below that, or give the whole list: data.train=[...]",
        ),
        ("data.train=[{}]", ": data.train.0: found neither path nor hub; give one of them"),
        ("data=\n null", ": data: found null; want a mapping of keys to values"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line_that_repeats_it(folder, override, told):
    repeated = f"override {' '.join(override.split())}"
    assert refusal(write(folder), override) == (told if told.startswith("override ") else f"{repeated}{told}")


# --- cost ---


def test_reading_recipes_imports_neither_torch_nor_transformers():
    check = (
        "import sys, flamingo_ft.config\n"
        "print(sorted({'torch', 'transformers', 'open_clip', 'rich', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
