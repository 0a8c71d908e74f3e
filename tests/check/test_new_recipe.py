"""A recipe made for a user's data loads, passes the check and trains; nothing is downloaded or replaced."""

from __future__ import annotations

import csv
import json
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from flamingo_ft.check.check_data import check_data
from flamingo_ft.check.inspect_data import guess_columns
from flamingo_ft.check.new_recipe import RecipeOptions, write_new_recipe
from flamingo_ft.cli import main
from flamingo_ft.config import load_recipe
from flamingo_ft.errors import UserError
from tests.data.fixtures import FIXTURES

ROW = ("Which shade is this?", "Dark.")


@pytest.fixture(autouse=True)
def offline(tmp_path, tmp_path_factory, monkeypatch):
    """Refuse connections, although the Hub's client may try them."""

    def refuse(*_):
        raise AssertionError("tried to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    # Histograms are slow to draw, and test_report_page.py covers them.
    monkeypatch.setattr("flamingo_ft.check.check_data.save_histograms", lambda report, folder: {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path)


def pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number % 256,) * 3).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def table(path: Path, header: list[str], rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def asked(names: list[str], **changes) -> list[dict]:
    rows = (
        {"image": name, "question": f"{number}: {ROW[0]}", "answer": ROW[1]}
        for number, name in enumerate(names)
    )
    return [row | changes for row in rows]


def rows_of(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def made(data: Path, **options):
    """Write a recipe for ``data``, and check it; return the recipe and the report of the check."""
    write_new_recipe(Path("mine/new.yaml"), RecipeOptions(data, **options))
    recipe = load_recipe("mine/new.yaml", ["train.num_workers=0"])
    findings = check_data(recipe, "new", Path("checked"))
    assert findings.objection is None and findings.warnings == findings.method_warnings, findings
    return recipe, findings


KINDS = (
    "llava",
    "sharegpt",
    "alpaca",
    "vqa",
    "mimicit",
    "interleaved_mmc4",
    "csv_captions",
    "preference",
    "unpaired_preference",
    "tar_shards",
)


@pytest.mark.parametrize("name", KINDS)
def test_data_of_any_schema_gets_a_recipe_that_passes_the_check(tmp_path, name):
    entry = FIXTURES[name](tmp_path)
    recipe, findings = made(
        Path(entry["path"]), image_root=entry.get("image_root") and Path(entry["image_root"])
    )
    assert recipe.data.train[0].format == findings.parts[0].format
    methods = {"preference": "dpo", "unpaired_preference": "kto"}
    assert recipe.train.method == methods.get(findings.parts[0].format, "sft")
    told = ["model.init_from is null" in line for line in findings.method_warnings]
    assert told == [True] * (recipe.train.method != "sft")


def test_lengths_and_sizes_follow_from_the_data(tmp_path):
    rows = asked(pictures(tmp_path, 50))
    rows[7]["answer"] = "Dark, and as far as anybody can say also rather small for a picture of this kind."
    recipe, findings = made(rows_of(tmp_path / "x.jsonl", rows))
    longest = max(findings.distributions["label_tokens"].most, findings.answers.longest)
    assert longest <= recipe.eval.max_new_tokens <= 2 * longest
    assert recipe.data.max_text_tokens >= findings.distributions["text_tokens"].most
    assert recipe.data.eval_fraction == 0.2 and [part.rows for part in findings.parts] == [40, 10]
    assert recipe.train.epochs == 20 and findings.lengths[""].max_steps == 50


def test_columns_of_other_names_and_images_in_another_folder_are_found(tmp_path):
    names = pictures(tmp_path / "data" / "scans", 10)
    data = table(tmp_path / "data" / "x.csv", ["Photo", "Query", "label"], [(name, *ROW) for name in names])
    recipe, findings = made(data)
    (source,) = recipe.data.train
    assert source.format == "vqa" and source.columns == {
        "image": "Photo",
        "question": "Query",
        "answer": "label",
    }
    assert source.image_root.resolve() == tmp_path / "data" / "scans" and findings.parts[0].images == 8


def test_images_beside_the_folder_of_the_data_are_found(tmp_path):
    names = pictures(tmp_path / "photos", 5)
    (tmp_path / "notes").mkdir()
    recipe, _ = made(rows_of(tmp_path / "notes" / "x.jsonl", asked([f"photos/{name}" for name in names])))
    assert recipe.data.train[0].image_root.resolve() == tmp_path


@pytest.mark.parametrize(
    ("columns", "guess"),
    [
        (["image", "question", "label"], ("vqa", {"answer": "label"})),
        (
            ["Image File", "Prompt", "A"],
            ("vqa", {"image": "Image File", "question": "Prompt", "answer": "A"}),
        ),
        (["file_name", "title"], ("caption", {"image": "file_name", "caption": "title"})),
        (["query", "reply"], ("vqa", {"question": "query", "answer": "reply"})),
        (["a_column", "another"], None),
    ],
)
def test_columns_are_guessed_by_common_names(columns, guess):
    assert guess_columns(columns) == guess


def test_columns_may_be_named_and_columns_that_fit_nothing_are_refused(tmp_path):
    data = table(
        tmp_path / "x.csv", ["one", "two", "three"], [(name, *ROW) for name in pictures(tmp_path, 4)]
    )
    with pytest.raises(UserError, match="one, two, three"):
        write_new_recipe(Path("mine/new.yaml"), RecipeOptions(data))
    assert not Path("mine").exists()
    command = ["recipes", "new", "new.yaml", "--data", str(data), "--format", "vqa"]
    columns = ("image=one", "question=two", "answer=three")
    assert main([*command, *(f"--column={column}" for column in columns)]) == 0
    assert load_recipe("new.yaml").data.train[0].columns == {
        "image": "one",
        "question": "two",
        "answer": "three",
    }


@pytest.mark.parametrize(
    "folder", ["it's: #1 {a, b}", "[x] -", "ü 日本", "new\nline", '"quoted"', "true", "1e3"]
)
def test_any_folder_name_is_read_back_from_the_recipe(tmp_path, folder):
    names = pictures(tmp_path / folder / "scans", 3)
    data = rows_of(tmp_path / folder / "x.jsonl", asked(names))
    file = tmp_path / "new.yaml"
    write_new_recipe(file, RecipeOptions(data, output_dir=folder))
    (source,) = load_recipe(file).data.train
    assert source.path == data and source.image_root == tmp_path / folder / "scans"
    assert load_recipe(file).train.output_dir == Path(folder)


def test_given_evaluation_data_is_used_and_measured(tmp_path):
    names = pictures(tmp_path, 6)
    train = rows_of(tmp_path / "x.jsonl", asked(names[:3]))
    answer = "Words, and words again, and more of them."
    evaluation = rows_of(tmp_path / "y.jsonl", asked(names[3:], answer=answer))
    recipe, findings = made(train, eval=evaluation)
    assert recipe.data.eval[0].path.resolve() == evaluation and recipe.data.eval_fraction is None
    assert findings.answers.answers == 3


def test_nothing_is_held_out_where_all_rows_share_an_image(tmp_path):
    recipe, _ = made(rows_of(tmp_path / "x.jsonl", asked(pictures(tmp_path, 1) * 4)))
    assert recipe.data.eval_fraction is None
    assert "no rows can be held out" in Path("mine/new.yaml").read_text()


def test_unusable_rows_are_noted_and_left_to_the_user(tmp_path):
    rows = [*asked(pictures(tmp_path, 5)), *asked(["gone.png"])]
    notes = write_new_recipe(Path("new.yaml"), RecipeOptions(rows_of(tmp_path / "x.jsonl", rows)))
    (note,) = notes
    assert "x.jsonl: 1 of 6 rows cannot be used, the first: row 5: " in note and "gone.png" in note
    assert load_recipe("new.yaml").data.on_bad_sample == "error"
    assert "gone.png" in Path("new.yaml").read_text()
    with pytest.raises(UserError, match=r"gone.png.*\(and none of the first 1 rows can be used\)"):
        write_new_recipe(Path("none.yaml"), RecipeOptions(rows_of(tmp_path / "y.jsonl", asked(["gone.png"]))))


def test_without_a_local_tokenizer_lengths_are_marked_as_estimates(tmp_path, capsys):
    data = rows_of(tmp_path / "x.jsonl", asked(pictures(tmp_path, 4)))
    assert main(["recipes", "new", "new.yaml", "--data", str(data), "--language", "somebody/some-model"]) == 0
    output, text = capsys.readouterr(), Path("new.yaml").read_text()
    assert "lengths are estimated from characters" in output.err and "wrote new.yaml" in output.out
    recipe = load_recipe("new.yaml")
    assert recipe.model.language.name == "somebody/some-model" and recipe.model.vision.name == "ViT-L-14"
    assert recipe.data.max_text_tokens is None and "estimated" in text


def test_nothing_is_overwritten(tmp_path, capsys):
    data = rows_of(tmp_path / "x.jsonl", asked(pictures(tmp_path, 4)))
    Path("new.yaml").write_text("mine")
    Path("recipe.schema.json").write_text("mine too")
    assert main(["recipes", "new", "new.yaml", "--data", str(data)]) == 2
    assert "error: new.yaml: exists already; choose another name" in capsys.readouterr().err
    assert main(["recipes", "new", "other.yaml", "--data", str(data)]) == 0
    assert Path("new.yaml").read_text() == "mine" and Path("recipe.schema.json").read_text() == "mine too"


def test_a_timm_tower_has_weights_of_its_own(tmp_path):
    data = rows_of(tmp_path / "x.jsonl", asked(pictures(tmp_path, 4)))
    assert main(["recipes", "new", "new.yaml", "--data", str(data), "--vision", "timm/resnet50"]) == 0
    vision = load_recipe("./new.yaml").model.vision
    assert (vision.name, vision.pretrained) == ("timm/resnet50", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "gone.jsonl"], "gone.jsonl: no such data file"),
        (
            ["--data", "x.jsonl", "--vision", "ViT-B-32"],
            "--vision ViT-B-32: an architecture has no weights of its own",
        ),
        (["--data", "x.jsonl", "--format", "vqaa"], "--format vqaa: no such format"),
        (["--data", "x.jsonl", "--column", "answer"], "--column answer: must be FIELD=COLUMN"),
        (["--data", "x.jsonl", "--image-root", "gone"], "'gone' does not exist"),
        ([], "Missing option '--data'"),
    ],
)
def test_a_usage_error_is_one_line_and_nothing_is_written(tmp_path, capsys, options, message):
    rows_of(tmp_path / "x.jsonl", asked(pictures(tmp_path, 2)))
    assert main(["recipes", "new", "new.yaml", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not Path("new.yaml").exists()


@pytest.mark.slow
def test_the_recipe_trains_and_is_planned(tmp_path):
    names = pictures(tmp_path / "data" / "scans", 12)
    data = table(tmp_path / "data" / "x.csv", ["photo", "query", "label"], [(name, *ROW) for name in names])
    assert main(["recipes", "new", "new.yaml", "--data", str(data)]) == 0
    assert main(["train", "new.yaml", "train.epochs=0.5", "train.num_workers=0"]) == 0
    assert json.loads(Path("runs/new/metrics.json").read_text())["train"]["steps"] == 1
    assert main(["plan", "new.yaml"]) == 0
    shutil.rmtree("runs")


def test_columns_that_a_new_recipe_leaves_out_are_named(tmp_path):
    rows = asked(pictures(tmp_path, 6), choices=["Dark.", "Light."], A="1", B="2")
    notes = write_new_recipe(Path("new.yaml"), RecipeOptions(rows_of(tmp_path / "x.jsonl", rows)))
    assert len(notes) == 1 and "columns of text that are left out: choices, A, B; " in notes[0]
    assert notes[0].endswith("results are shown by it with --column task=COLUMN")
    rows = asked(pictures(tmp_path, 6), kind="shade")
    (note,) = write_new_recipe(Path("one.yaml"), RecipeOptions(rows_of(tmp_path / "y.jsonl", rows)))
    assert note.endswith("results are shown by it with --column task=kind")
    assert "# Columns of text that are left out: choices, A, B\n" in Path("new.yaml").read_text()


@pytest.mark.parametrize("language", ["nano", "org/other"])
@pytest.mark.parametrize("kind", ["preference", "unpaired_preference"])
def test_a_new_recipe_for_preferences_asks_for_a_trained_start_and_learns_slowly(
    tmp_path, capsys, kind, language
):
    entry = FIXTURES[kind](tmp_path)
    options = ["--language", language, "--pretrained", "openai"] if language != "nano" else []
    assert main(["recipes", "new", "new.yaml", "--data", entry["path"], *options]) == 0
    assert "note: rows of preferences refine a model that answers already" in capsys.readouterr().err
    assert "\n  # init_from: runs/NAME\n" in Path("new.yaml").read_text()
    assert load_recipe("new.yaml").train.learning_rate <= 1e-4


def test_a_new_recipe_for_rows_without_images_says_so(tmp_path):
    rows = [{"question": f"{number}?", "answer": "Yes.", "shot": f"{number}.png"} for number in range(6)]
    notes = write_new_recipe(Path("new.yaml"), RecipeOptions(rows_of(tmp_path / "x.jsonl", rows)))
    expected = "the rows read have no images; if a column holds them, add --column image=COLUMN"
    assert any(expected in note for note in notes)
