"""Recipes are validated strictly: every error has its line in the file, the value and a remedy."""

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

from flamingo_ft.config import RELEASED_PERCEIVER, Recipe, dump_recipe, load_recipe
from flamingo_ft.config.paths import strip_recipe_paths
from flamingo_ft.config.section import section_of
from flamingo_ft.config.tables import FOREIGN_KEYS
from flamingo_ft.config.yaml_document import parse
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
    """Return the error for a recipe, with the recipe's own path shortened to `recipe.yaml`."""
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
def test_every_common_notation_of_a_number_is_accepted(folder, text):
    assert load_recipe(write(folder), [f"train.learning_rate={text}"]).train.learning_rate == 1e-4


def test_an_escaped_surrogate_pair_is_one_character_as_in_json():
    values = {"key": "\N{GRINNING FACE}"}
    assert parse(json.dumps(values), "x").values == values


@pytest.mark.parametrize("text", ["on", "no", "12:30", "2024-01-01", "0123", "1_", "0x1f", "none", "1e", "."])
def test_yaml_1_1_scalars_such_as_on_and_dates_stay_text(text):
    assert parse(f"key: {text}", "x").values == {"key": text}


def test_anchors_and_merges_work_and_errors_in_them_are_reported_with_their_line(folder):
    text = MINIMAL + "  <<: &more {seed: 3, batch_size: 4}\n  batch_size: 2\n"
    recipe = load_recipe(write(folder, text))
    assert (recipe.train.seed, recipe.train.batch_size) == (3, 2)
    assert refusal(write(folder, text.replace("seed: 3", "sed: 3"))).startswith(
        "recipe.yaml:10: train.sed: unknown"
    )


# --- paths ---


def test_paths_in_the_file_are_relative_to_it_and_paths_in_overrides_to_the_current_directory(folder):
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


def test_the_output_folder_is_relative_to_the_current_directory(folder):
    assert load_recipe(write(folder)).train.output_dir == Path("runs/one")
    assert load_recipe(write(folder), ["train.output_dir=~/x"]).train.output_dir == Path.home() / "x"


def make_models(folder: Path) -> None:
    """Write a folder for each backbone and a run, with only its config, and an empty file of weights."""
    for path in (
        "models/lm/config.json",
        "lm/config.json",
        "eyes/open_clip_config.json",
        "runs/first/config.json",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("{}")
    (folder / "eyes.pt").write_text("")


def model_names(recipe: Recipe) -> list[str | None]:
    model = recipe.model
    values = (model.vision.name, model.vision.pretrained, model.language.name, model.init_from)
    return [None if value is None else str(value) for value in values]


LOCAL = MINIMAL.replace("vision: {name: nano}", "vision: {name: eyes}").replace(
    "{name: nano}\ndata", "{name: models/lm}\n  init_from: runs/first\ndata"
)


def test_paths_of_models_are_relative_to_the_recipe_in_every_current_directory(folder, monkeypatch):
    make_models(folder)
    expected = [str(folder / "eyes"), None, str(folder / "models/lm"), str(folder / "runs/first")]
    for directory in (folder, folder / "elsewhere", folder / "runs"):
        monkeypatch.chdir(directory)
        assert model_names(load_recipe(write(folder, LOCAL))) == expected
    for name, path in {
        "./lm": folder / "lm",
        "lm": folder / "lm",
        "../lm": folder / "../lm",
        "~/lm": Path.home() / "lm",
    }.items():
        recipe = load_recipe(write(folder, LOCAL.replace("models/lm", name)), require=())
        assert recipe.model.language.name == str(path)
    weights = LOCAL.replace("{name: eyes}", "{name: ViT-B-32, pretrained: eyes.pt}")
    assert model_names(load_recipe(write(folder, weights)))[:2] == ["ViT-B-32", str(folder / "eyes.pt")]


def test_the_path_of_a_model_in_an_override_is_relative_to_the_current_directory(folder):
    make_models(folder / "elsewhere")
    overrides = ["model.vision.name=eyes", "model.language={name: models/lm}", "model.init_from=runs/first"]
    here = folder / "elsewhere"
    expected = [str(here / "eyes"), None, str(here / "models/lm"), str(here / "runs/first")]
    assert model_names(load_recipe(write(folder), overrides)) == expected
    recipe = load_recipe(write(folder), ["model.vision={name: ViT-B-32, pretrained: eyes.pt}"])
    assert recipe.model.vision.pretrained == str(here / "eyes.pt")


def test_names_on_the_hub_and_in_openclip_are_not_taken_for_paths(folder):
    make_models(folder)
    (folder / "gpt2").mkdir()
    (folder / "openai").mkdir()
    for vision in (
        "{name: nano}",
        "{name: hf-hub:org/eyes}",
        "{name: ViT-L-14, pretrained: openai}",
        "{name: eyes, pretrained: x}",
    ):
        for language in (
            "{name: gpt2}",
            "{name: org/lm}",
            "{name: nano}",
            "{name: models/other, revision: main}",
        ):
            text = MINIMAL.replace("vision: {name: nano}", f"vision: {vision}")
            text = text.replace("language: {name: nano}", f"language: {language}\n  init_from: org/start@v1")
            recipe, model = load_recipe(write(folder, text)), yaml.safe_load(text)["model"]
            assert recipe.model.vision.name == model["vision"]["name"]
            assert recipe.model.vision.pretrained == model["vision"].get("pretrained")
            assert recipe.model.language.name == model["language"]["name"]
            assert str(recipe.model.init_from) == "org/start@v1"


def test_a_model_found_only_as_in_earlier_versions_is_used_with_a_warning(folder):
    here = folder / "elsewhere"
    make_models(here)
    with pytest.warns(UserWarning) as warned:
        recipe = load_recipe(write(folder, LOCAL))
    assert model_names(recipe) == [
        str(here / "eyes"),
        None,
        str(here / "models/lm"),
        str(here / "runs/first"),
    ]
    lines = [str(one.message).removeprefix(str(folder)) for one in warned]
    assert [line.split(": ")[:2] for line in lines] == [
        ["/recipe.yaml:2", "model.vision.name"],
        ["/recipe.yaml:3", "model.language.name"],
        ["/recipe.yaml:4", "model.init_from"],
    ]
    assert all("from the current directory, as earlier versions did" in line for line in lines)


def test_a_warning_names_the_init_from_that_earlier_versions_would_have_used(folder):
    make_models(folder)
    make_models(folder / "elsewhere")
    with pytest.warns(
        UserWarning, match=f"using {folder}/runs/first; earlier versions used {folder}/elsewhere/runs/first"
    ):
        assert load_recipe(write(folder, LOCAL)).model.init_from == folder / "runs" / "first"


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("name: eyes", "name: ./eyse", "2: model.vision.name: no folder {}/eyse; did you mean {}/eyes?"),
        (
            "name: eyes",
            "name: ViT-B-32, pretrained: eye.pt",
            "2: model.vision.pretrained: no file {}/eye.pt; did you mean {}/eyes.pt?",
        ),
        (
            "models/lm",
            "models/ml",
            "3: model.language.name: no folder {}/models/ml; "
            "relative paths here start from the recipe's folder "
            "(on the Hub: models/ml with revision main)",
        ),
        (
            "runs/first",
            "runs/frist",
            "4: model.init_from: no folder {}/runs/frist; did you mean {}/runs/first? "
            "(on the Hub: runs/frist@main)",
        ),
        (
            "path: train.jsonl",
            "path: trian.jsonl",
            "7: data.train.0.path: no file {}/trian.jsonl; did you mean {}/train.jsonl?",
        ),
        (
            "jsonl",
            "jsonl\n      image_root: fotos",
            "8: data.train.0.image_root: no folder {}/fotos; did you mean {}/photos?",
        ),
    ],
)
def test_a_mistyped_path_is_refused_with_its_line_and_the_nearest_one(folder, right, wrong, expected):
    make_models(folder)
    (folder / "photos").mkdir()
    assert right in LOCAL
    message = refusal(write(folder, LOCAL.replace(right, wrong)))
    assert message == f"recipe.yaml:{expected.replace('{}', str(folder))}"


def test_an_unknown_home_directory_is_a_missing_path(folder):
    message = refusal(write(folder), "data.train.0.path=~nobody-at-all/x.jsonl")
    assert "data.train.0.path: no file " in message


def test_paths_are_stripped_for_publication_and_text_is_not(folder):
    make_models(folder)
    extra = "  system_prompt: /no_think Answer.\n  cache: {folder: /home/me/tokens}\n"
    text = LOCAL.replace("train:\n  output", extra + "train:\n  output").replace(
        "jsonl", "jsonl\n      columns: {answer: /label}"
    )
    shown = strip_recipe_paths(yaml.safe_load(dump_recipe(load_recipe(write(folder, text)))))
    assert str(folder) not in yaml.safe_dump(shown) and shown["data"]["cache"]["folder"] == "tokens"
    assert shown["model"]["language"]["name"] == "lm" and shown["model"]["init_from"] == "first"
    assert shown["data"]["system_prompt"] == "/no_think Answer." and shown["data"]["train"][0]["columns"] == {
        "answer": "/label"
    }


def test_a_missing_file_is_reported_with_its_line_unless_it_is_not_required(folder):
    path = write(folder, MINIMAL.replace("train.jsonl", "gone.jsonl"))
    missing = folder / "gone.jsonl"
    assert refusal(path) == (
        f"recipe.yaml:6: data.train.0.path: no file {missing}; "
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
    ("  max_steps: 10", "  max_steps: ten", "9: train.max_steps: must be a whole number, got 'ten'"),
    ("  max_steps: 10", "  max_steps: '10'", "9: train.max_steps: must be a whole number, got '10'"),
    ("  max_steps: 10", "  max_steps: 1.5", "9: train.max_steps: must be a whole number, got 1.5"),
    ("  max_steps: 10", "  max_steps: true", "9: train.max_steps: must be a whole number, got true"),
    ("  max_steps: 10", "  max_steps: 0", "9: train.max_steps: must be 1 or more, got 0"),
    ("  max_steps: 10", "  max_steps:", "9: train.max_steps: missing; add it, or train.epochs instead"),
    ("  max_steps: 10", "  max_steps: [1]", "9: train.max_steps: must be a whole number, got a list"),
    ("  max_steps: 10\n", "", "7: train.max_steps: missing; add it"),
    (
        "    - path: train.jsonl",
        "    - image_root: x",
        "6: data.train.0: got neither path nor hub; set one of them",
    ),
    (
        "    - path: train.jsonl",
        "    - train.jsonl",
        "6: data.train.0: must be a mapping of keys to values, got 'train.jsonl'",
    ),
    ("    - path: train.jsonl", "    []", "5: data.train: got an empty list; give at least one entry"),
    (
        "{name: nano}\ndata",
        "{name: 12}\ndata",
        "3: model.language.name: must be text (put it in quotes), got 12",
    ),
    (
        "{name: nano}\ndata",
        "nano\ndata",
        "3: model.language: must be a mapping of keys to values, got 'nano'",
    ),
]


@pytest.mark.parametrize("right, wrong, expected", WRONG_LINES)
def test_an_invalid_value_is_reported_with_its_line_number_and_value(folder, right, wrong, expected):
    assert right in MINIMAL
    message = refusal(write(folder, MINIMAL.replace(right, wrong)))
    assert message.startswith(f"recipe.yaml:{expected}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "extra, expected",
    [
        ("learning_rate: 1e-4", "learning_rate: unknown key; did you mean train.learning_rate?"),
        ("heads: 8", "did you mean model.perceiver.heads or model.cross_attention.heads?"),
        ("vision: {name: nano}", "did you mean model.vision or lora.vision?"),
        ("zzz: 1", "zzz: unknown key; the keys here are model, trainable, lora, data, train, eval, stages"),
        ("eval: {sed: 1}", "eval.sed: unknown key; did you mean train.seed?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_keys(folder, extra, expected):
    message = refusal(write(folder, MINIMAL + extra + "\n"))
    assert message.startswith("recipe.yaml:10: ") and message.endswith(expected)


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("model.language.quantization", "int4", "must be 'none', 'int8', 'nf4' or 'fp4', got 'int4'"),
        ("model.vision.compute_dtype", "half", "must be 'auto', 'fp32', 'bf16' or 'fp16', got 'half'"),
        (
            "train.optimizer",
            "sgd",
            "must be 'muon', 'adamw', 'adamw_8bit', 'paged_adamw' or 'paged_adamw_8bit', got 'sgd'",
        ),
        (
            "data.too_long",
            "cut",
            "must be 'error', 'drop_sample', 'drop_turns' or 'truncate_text', got 'cut'",
        ),
    ],
)
def test_an_invalid_choice_is_reported_with_the_valid_ones(folder, key, value, expected):
    override = f"{key}={value}"
    assert refusal(write(folder), override) == f"override {override}: {key}: {expected}"


def test_training_nothing_is_refused(folder):
    message = refusal(
        write(folder), "trainable={perceiver: false, cross_attention: false, new_tokens: false}"
    )
    assert message.endswith(
        "trainable: nothing would be trained; set one part to true, or configure lora for one"
    )


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "lora.perceiver={}",
            "lora.perceiver: trainable.perceiver is true too; train the part in full or through LoRA",
        ),
        (
            "model.bridge_quantization=nf4",
            "model.bridge_quantization: a newly initialized bridge has to be trained",
        ),
        (
            "model={init_from: x, bridge_quantization: nf4, vision: {name: nano}, language: {name: nano}}",
            "model.bridge_quantization: the whole bridge is trained in full, "
            "and only frozen parts are quantized",
        ),
        ("lora.language={r: 0}", "lora.language.r: must be 1 or more, got 0"),
        ("lora.language={rank: 8}", "lora.language.rank: unknown key; did you mean lora.language.r?"),
        (
            "lora.language={zzz: 8}",
            "lora.language.zzz: unknown key; the keys here are r, lora_alpha, target_modules",
        ),
        ("lora.language={target_modules: 3}", "lora.language.target_modules: must be a list, got 3"),
        ("data.train=a.csv", "data.train: must be a list such as [{path: a.csv}], got 'a.csv'"),
        ("eval.metrics=anls", "eval.metrics: must be a list such as [anls], got 'anls'"),
        ("lora.langage={}", "lora.langage: unknown key; did you mean lora.language?"),
    ],
)
def test_a_cross_field_error_or_a_wrong_lora_key_is_reported_in_one_line(folder, override, expected):
    assert refusal(write(folder), override).startswith(f"override {override}: {expected}")


def test_with_init_from_the_sizes_left_out_are_those_of_the_released_models(folder):
    new, start = (
        load_recipe(write(folder), overrides, require=()) for overrides in ([], ["model.init_from=first"])
    )
    assert new.model.perceiver.depth == 0 and start.model.perceiver == RELEASED_PERCEIVER
    shaped = load_recipe(write(folder), ["model.init_from=first", "model.perceiver.depth=2"], require=())
    assert shaped.model.perceiver == RELEASED_PERCEIVER.model_copy(update={"depth": 2})
    assert refusal(write(folder), "model.init_from=first", "model.perceiver=2").endswith(
        "must be a mapping of keys to values, got 2"
    )


@pytest.mark.parametrize("overrides", [[], ["model.init_from=first"]], ids=["new", "init_from"])
def test_a_runs_own_recipe_keeps_the_defaults_of_the_version_that_wrote_it(folder, overrides):
    recipe = load_recipe(write(folder), [*overrides, "train.learning_rate=0.5"], require=())
    (folder / "resolved_recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(folder / "resolved_recipe.yaml", require=()) == recipe
    values = recipe.model_dump(mode="json")
    del values["train"]["learning_rates"]["gates"]
    (folder / "resolved_recipe.yaml").write_text(yaml.safe_dump(values))
    earlier = load_recipe(folder / "resolved_recipe.yaml", require=())
    assert earlier.train.learning_rates.gates == 0.5


def test_init_from_becomes_an_absolute_path_and_has_to_exist(folder):
    message = refusal(write(folder), "model.init_from=gone")
    assert (
        f"model.init_from: no folder {folder}/elsewhere/gone; "
        "relative paths here start from the current directory" in message
    )
    recipe = load_recipe(write(folder), ["model.init_from=gone"], require=("data",))
    assert recipe.model.init_from == folder / "elsewhere" / "gone"


INCOMPATIBLE = {
    ("data.cache={folder: tokens}", "data.augmentation={flip: 0.5}"): (
        "data.cache: augmentation changes each image every time, so its features cannot be cached; "
        "set one of them to null"
    ),
    ("data.cache={folder: tokens}", "lora.vision={r: 2}"): (
        "data.cache: lora.vision changes the tower, so its features cannot be cached; set one of them to null"
    ),
    ("data.packing=true",): (
        "data.packing: packed rows need a fixed length; set data.max_text_tokens, or packing to false"
    ),
    ("data.packing=true", "data.max_text_tokens=64", "data.group_by_length=true"): (
        "data.group_by_length: packed rows all have the same length; set group_by_length or packing to false"
    ),
    ("data.eval_fraction=0.1", "data.train.0.streaming=true"): (
        "data.eval_fraction: a fraction of a streamed source cannot be held out; "
        "use data.eval, or set streaming to false"
    ),
    ("data.train.0.hub=org/name",): "data.train.0: got both path and hub; set one of them, the other to null",
    ("data.train.0.config=small",): (
        "data.train.0.config: only applies to hub, a dataset on the Hugging Face Hub; remove it"
    ),
    ("data.train.0.data_files=a.json",): (
        "data.train.0.data_files: only applies to hub, a dataset on the Hugging Face Hub; remove it"
    ),
    ("data.train.0.revision=main",): (
        "data.train.0.revision: only applies to hub, a dataset on the Hugging Face Hub; remove it"
    ),
    ("train.epochs=2", "train.max_steps=3"): "train.epochs: got 2 beside max_steps 3; remove one of them",
    ("train={output_dir: x, max_steps: 3, epochs: 2}",): (
        "train.epochs: got 2 beside max_steps 3; remove one of them"
    ),
    ("train={output_dir: x}",): "train.max_steps: missing; add it, or train.epochs instead",
    ("train.epochs=2", "data.train.0.streaming=true"): (
        "train.epochs: a streamed source has no known length; use train.max_steps, or set streaming to false"
    ),
    ("train.warmup_ratio=0.1", "train.warmup_steps=3"): (
        "train.warmup_ratio: got 0.1 beside warmup_steps 3; remove one of them"
    ),
    ("train.optimizer_in_backward=true", "train.gradient_accumulation_steps=4"): (
        "train.optimizer_in_backward: got gradient_accumulation_steps 4, but the optimizer steps in every "
        "backward pass; use 1 and a larger batch_size, or set optimizer_in_backward to false"
    ),
    ("train.optimizer_in_backward=true", "train.non_finite=skip_step"): (
        "train.non_finite: a step inside the backward pass cannot be skipped afterwards; "
        "use stop, or set optimizer_in_backward to false"
    ),
    ("train.precision=fp16", "trainable.dtype=bf16"): (
        "trainable.dtype: got bf16 with train.precision fp16, which needs fp32 weights; "
        "use fp32, or train.precision bf16"
    ),
    ("eval.keep=best",): "eval.keep: best needs evaluations during training; set eval.steps",
    ("eval.patience=2",): "eval.patience: needs evaluations during training; set eval.steps",
    ("eval.steps=5",): (
        "eval.steps: needs samples to evaluate on; set data.eval or data.eval_fraction, or eval.steps to null"
    ),
    ("eval={steps: 5, metric: accuracy, answers: false}", "data.eval_fraction=0.1"): (
        "eval.metric: accuracy needs generated answers; set eval.answers to true, or use loss"
    ),
    ("train.dpo={beta: 0.2}",): (
        "train.dpo: has no effect with train.method sft; remove it, or use method dpo"
    ),
    ("train.fsdp=true", "train.method=dpo"): (
        "train.fsdp: dpo's reference model shares the weights that would be sharded; "
        "use method sft, or set fsdp to false"
    ),
    ("train.fsdp=true", "train.optimizer=adamw_8bit"): (
        "train.optimizer: sharded weights need adamw after the backward pass; "
        "use adamw without optimizer_in_backward, or set train.fsdp to false"
    ),
    ("train.fsdp=true", "data.cache={folder: tokens}"): (
        "data.cache: the cached tower runs outside the sharded model; "
        "set cache to null, or train.fsdp to false"
    ),
    ("train.fsdp=true", "model.language.quantization=int8"): (
        "train.fsdp: 8-bit matrices and a quantized bridge cannot be sharded; "
        "use nf4 or none, or set fsdp to false"
    ),
}


@pytest.mark.parametrize("overrides", INCOMPATIBLE, ids=" ".join)
def test_incompatible_settings_are_reported_in_one_line_with_a_remedy(folder, overrides):
    message = refusal(write(folder), *overrides)
    assert message.endswith(f": {INCOMPATIBLE[overrides]}") and "\n" not in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=0", "train.epochs: must be more than 0, got 0"),
        ("train.warmup_ratio=1", "train.warmup_ratio: "),
    ],
)
def test_a_length_out_of_range_is_reported_in_one_line(folder, override, expected):
    message = refusal(write(folder), override)
    assert expected in message and "\n" not in message


def test_an_override_in_epochs_replaces_the_steps_of_the_file_and_vice_versa(folder):
    recipe = load_recipe(write(folder), ["train.epochs=1.5", "train.warmup_ratio=0.1"])
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.train.warmup_steps) == (1.5, None, 0)
    in_epochs = write(folder, MINIMAL.replace("max_steps: 10", "epochs: 3\n  warmup_ratio: 0.1"))
    recipe = load_recipe(in_epochs, ["train.max_steps=7", "train.warmup_steps=2"])
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.train.warmup_ratio) == (None, 7, None)
    assert load_recipe(in_epochs, ["train.seed=1"]).train.epochs == 3


def test_a_data_path_may_be_a_folder_or_a_pattern_that_matches_files(folder):
    (folder / "photos").mkdir()
    for path in ("photos", "*.jsonl"):
        assert load_recipe(write(folder), [f"data.train.0.path={folder}/{path}"])
    assert ": no file " in refusal(write(folder), f"data.train.0.path={folder}/*.tar")


def test_every_error_has_its_own_line_in_the_order_of_the_file(folder):
    text = MINIMAL.replace("vision", "vison").replace("10", "ten") + "  seed: -1\n"
    lines = refusal(write(folder, text)).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["recipe.yaml:2", "recipe.yaml:9", "recipe.yaml:10"]


SEVERAL = """\
model:
  vision: {name: nano}
  language: {name: nano}
data:
  packing: true
  eval_fraction: 0.1
  train:
    - path: train.jsonl
      streaming: true
      config: small
train:
  output_dir: runs/one
  max_steps: 10
  optimizer_in_backward: true
  gradient_accumulation_steps: 2
lora: {cross_attention: {}}
"""


def lines_of(message: str) -> list[int]:
    return [int(line.split(":")[1]) for line in message.splitlines()]


def test_every_cross_field_error_has_its_own_line_in_the_order_of_the_file(folder):
    message = refusal(write(folder, SEVERAL))
    assert lines_of(message) == [5, 6, 10, 14, 16]
    with pytest.raises(ValidationError, match="data.packing: .*; data.eval_fraction: "):
        Recipe.model_validate(yaml.safe_load(SEVERAL))


def test_cross_field_errors_are_reported_beside_errors_of_single_values(folder):
    wrong = SEVERAL.replace("max_steps: 10", "max_steps: ten\n  report_to: [nowhere]").replace(
        "  packing", "  qqq: 1\n  packing"
    )
    assert lines_of(refusal(write(folder, wrong))) == [5, 6, 7, 11, 14, 15, 16, 18]


def test_a_consequence_of_an_invalid_value_is_not_reported_as_a_cross_field_error(folder):
    unknown = SEVERAL.replace("packing: true", "packing: true\n  max_text_tokens: many").replace(
        "lora:", "trainable: {cross_attention: 'no'}\nlora:"
    )
    message = refusal(write(folder, unknown))
    assert "data.packing" not in message and "lora.cross_attention" not in message
    assert lines_of(message) == [6, 7, 11, 15, 17]
    assert "nothing would be trained" not in refusal(
        write(folder), "trainable={perceiver: 3, cross_attention: false, new_tokens: false}"
    )


@pytest.mark.parametrize(
    "text",
    ["model: 3\ndata: {}\ntrain: []\n", "data: {packing: true}\n", "train: {optimizer_in_backward: true}\n"],
)
def test_missing_sections_are_reported(folder, text):
    assert "missing" in refusal(write(folder, text))


def known_keys(section: type, prefix: str = "") -> set[str]:
    keys = set()
    for name, field in section.model_fields.items():
        keys.add(prefix + name)
        inside = section_of(field.annotation)
        if inside is not None:
            keys |= known_keys(
                inside, f"{prefix}{name}." + ("0." if "tuple" in str(field.annotation) else "")
            )
    return keys


def test_every_foreign_key_maps_to_a_recipe_key_and_is_not_one_itself():
    known = known_keys(Recipe)
    assert {*FOREIGN_KEYS.values()} <= known
    assert not {*FOREIGN_KEYS} & {key.rpartition(".")[2] for key in known} and all(
        key == key.lower() for key in FOREIGN_KEYS
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=1e-4", "train.lr: unknown key; did you mean train.learning_rate?"),
        ("train.LR=1e-4", "train.LR: unknown key; did you mean train.learning_rate?"),
        ("train.per_device_train_batch_size=2", "did you mean train.batch_size?"),
        ("max_seq_length=10", "max_seq_length: unknown key; did you mean data.max_text_tokens?"),
        ("model.load_in_4bit=true", "did you mean model.language.quantization?"),
        ("model_name_or_path=gpt2", "did you mean model.language.name?"),
        ("lora.lora_r=8", "did you mean lora.language.r?"),
        ("dataset=x", "did you mean data.train?"),
        ("train.zzz=1", "train.zzz: unknown key; see flamingo-ft recipes keys train"),
    ],
)
def test_a_key_of_another_trainer_is_refused_with_the_key_of_a_recipe(folder, override, expected):
    assert refusal(write(folder), override).endswith(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            MINIMAL + "  max_steps: 12\n",
            "recipe.yaml:10: max_steps: duplicate key, first on line 9; keep one",
        ),
        (MINIMAL + "1: 2\n", "recipe.yaml:10: got 1 as a key; keys have to be text"),
        (MINIMAL + "[a]: 2\n", "recipe.yaml:10: got a list or mapping as a key; keys have to be text"),
        (
            MINIMAL + "\tseed: 2\n",
            "recipe.yaml:10: not valid YAML: found character '\\t' that cannot start any token",
        ),
        ("model: {vision: nano\n", "recipe.yaml:2: not valid YAML: "),
        (
            "model: !!python/object:os.system {}\n",
            "recipe.yaml:1: not valid YAML: got a tag; remove it",
        ),
        ("a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML: but found another document"),
        (
            'a:\n  - "half \\ud83d"\n',
            "recipe.yaml:2: not valid YAML: got half of a surrogate pair; write the character itself",
        ),
        (
            "a: \x00\n",
            "recipe.yaml:1: not valid YAML: special characters are not allowed; remove the character",
        ),
        (
            "",
            "recipe.yaml:1: not a mapping; a recipe has the keys model, trainable, lora, data, train",
        ),
        ("# only a comment\n", "recipe.yaml:1: not a mapping"),
        ("- a\n", "recipe.yaml:1: not a mapping"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_refused_with_the_line(folder, text, expected):
    message = refusal(write(folder, text))
    assert message.startswith(expected) and "\n" not in message


def test_a_file_that_is_not_text_is_refused(folder):
    path = write(folder)
    path.write_bytes(b"model: \xff\xfe")
    assert refusal(path) == "recipe.yaml: not UTF-8 text (byte 7); save the recipe as UTF-8"


def test_a_recipe_that_contains_itself_is_refused(folder):
    assert refusal(write(folder, MINIMAL + "eval: &a\n  before: *a\n")).startswith(
        "recipe.yaml:11: eval.before: must be true or false, got a mapping"
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_arbitrary_yaml_is_either_a_recipe_or_a_user_error(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("any")
    for content in (value, {"model": value, "data": {"train": value}, "train": {"max_steps": value}}):
        with pytest.raises(UserError) as refused:
            load_recipe(path := write(folder, yaml.safe_dump(content)))
        assert all(line.startswith(f"{path}:") for line in str(refused.value).splitlines())


# --- overrides ---


def test_overrides_take_precedence_over_the_file_and_later_ones_over_earlier_ones(folder):
    recipe = load_recipe(write(folder), ["train.max_steps=11", "train.max_steps=12", "eval.before=false"])
    assert recipe.train.max_steps == 12 and recipe.eval.before is False


def test_an_override_can_set_a_required_key_that_the_file_lacks(folder):
    path = write(folder, MINIMAL.replace("  max_steps: 10\n", ""))
    assert load_recipe(path, ["train.max_steps=3"]).train.max_steps == 3


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.max_steps", "override 'train.max_steps': must be KEY=VALUE, such as train.max_steps=10"),
        ("=3", "override '=3': must be KEY=VALUE, such as train.max_steps=10"),
        ("train..seed=3", "override 'train..seed=3': must be KEY=VALUE, such as train.max_steps=10"),
        ("train.max_step=3", ": train.max_step: unknown key; did you mean train.max_steps?"),
        ("trian.seed=3", ": trian: unknown key; did you mean train?"),
        ("train.seed=x", ": train.seed: must be a whole number, got 'x'"),
        ("train.seed=[", ":1: not valid YAML: expected the node content, but found '<stream end>'"),
        ("train.seed.x=3", ": train.seed: must be a whole number, got a mapping"),
        (
            "train.max_steps.x=3",
            ": train.max_steps is a single value and has no keys; set train.max_steps itself",
        ),
        (
            "data.train.1.path=x",
            ": data.train is a list of 1; use an index below that, or give the whole list: data.train=[...]",
        ),
        ("data.train=[{}]", ": data.train.0: got neither path nor hub; set one of them"),
        ("data=\n null", ": data: must be a mapping of keys to values, got null"),
    ],
)
def test_an_invalid_override_is_reported_in_one_line_that_repeats_it(folder, override, expected):
    repeated = f"override {' '.join(override.split())}"
    assert refusal(write(folder), override) == (
        expected if expected.startswith("override ") else f"{repeated}{expected}"
    )


# --- cost ---


def test_loading_recipes_imports_neither_torch_nor_transformers():
    check = (
        "import sys, flamingo_ft.config\n"
        "print(sorted({'torch', 'transformers', 'open_clip', 'rich', 'typer'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
